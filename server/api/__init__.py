"""OpenAI's endpoints, the tokenizer's, and the operators'.

Reading order:

    completions        the simplest generation: body, job, answer whole or streamed
    echo               its prompt, given back before the answer
    answers            what completions and chat completions share: envelope, usage, streams
    chat, logprobs     conversations; log-probabilities in OpenAI's shapes
    call_forms         calls in the old form, and of custom tools
    stored_streams     GET and DELETE of resumable streams
    embeddings, tokenization, operations, adapters    the other endpoints
    invocations        one path for several of them, as SageMaker asks
    translation        how dialects are written on top of a chat completion

May import `requests`, `http`, `parsing`, `text` and the ground (server/*.py), and of the engine its
words, `engine.process` and `engine.grammar`.
"""
