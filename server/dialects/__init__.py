"""Other chat APIs, written on top of chat completions: OpenAI's Responses, Anthropic's Messages.

A body becomes the body of a chat completion and is validated as one; the answer is written from the
choices of the chat's stream. See api/translation.py first; then, for each API:

    messages, responses                  the endpoints
    messages_body, responses_body        a body, and the chat that it asks for
    messages_events, responses_events    the answer: the object and its events

May import `api`, `requests`, `http`, `parsing`, `text` and the ground (server/*.py), and of the
engine its words, `engine.process` and `engine.grammar`.
"""
