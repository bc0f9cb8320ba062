"""From a validated body to the engine's requests, and from its tokens to the text of each choice.

Reading order, which is the way of a request:

    state            the server's state, which every endpoint gets
    field_types      types of single fields, with their checks
    protocol         the bodies as pydantic models, and their validation
    unsupported      known fields that are refused, and hints, which have no effect
    preparation      from a body to a job: begin here for the whole picture
    sampling         sampling parameters and their limits
    tool_choice      the tools that a chat offers
    chat_prompt      a chat as the token ids of a prompt
    structured       the structure that an answer must have, as a grammar
    forced_calls     the grammar of a chat's answer: calls, a structure, or either
    job              the engine's requests, with their deadlines
    choice           a choice as it grows, and the deltas that it gives
    generation       a job run through the engine, to the text of each choice
    merged_outputs   the outputs of several engine requests as one stream

This room may import `server.http`, `server.tracing`, `server.parsing`, `server.text`, the server's
ground modules, `engine.grammar` and the engine's words.
"""
