"""Other chat APIs, written on top of chat completions: OpenAI's Responses, Anthropic's Messages.

A body becomes the body of a chat completion and is validated as one; the answer is written from the
choices of the chat's stream. See api/translation.py first; then, for each API:

    messages, responses                  the endpoints
    messages_body, responses_body        a body, and the chat that it asks for
    messages_events, responses_events    the answer: the object and its events

and what they need:

    hints              fields that have no effect, which the answer's header names
    sealed             reasoning in an opaque form, for clients that only keep it
    messages_blocks    the blocks of Anthropic's messages
    responses_items    the items of a response's conversation
    responses_tools    which function of the chat stands for which tool
    custom_input       the input of a custom tool, read from a call's arguments as they come
    responses_extra    input items, input tokens, compaction
    conversations      conversations that the server keeps

May import `api`, `requests`, `http`, `parsing`, `text` and the ground (server/*.py), and of the
engine its words, `engine.process` and `engine.grammar`.
"""
