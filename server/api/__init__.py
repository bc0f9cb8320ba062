"""OpenAI's endpoints, the tokenizer's, and the operators'.

Reading order:

    completions        the simplest generation: body, job, answer whole or streamed
    answers            what completions and chat completions share: envelope, usage, streams
    chat, logprobs     conversations; log-probabilities in OpenAI's shapes
    stored_streams     GET and DELETE of resumable streams
    embeddings, tokenization, operations, adapters    the other endpoints
    translation        how dialects are written on top of a chat completion

May import `requests`, `http`, `parsing`, `text` and the ground (server/*.py), and of the engine its
words, `engine.process` and `engine.grammar`.
"""
