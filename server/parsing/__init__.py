"""A model's text, read as a message: its reasoning, its content and its tool calls.

Parsers are incremental: they take text in pieces and return events, and the events add up to the
same message however the text was cut. Streamed and whole answers use the same parsers.

Reading order:

    message_events   the events, and how they add up to a message
    json_scanner     where a JSON value ends, and whether it is valid so far
    reasoning        `<think>…</think>` separated from the answer
    answer_parser    the base of the parsers of tool calls: begin here, it explains how they work
    tool_parsers     calls amid content, and calls written as JSON objects
    harmony          gpt-oss's format, in which reasoning and calls are both messages
    tool_formats     one parser for each format of calls, and how a format is detected
    reasoning_tokens the tokens of the reasoning, counted
    message_parser   the whole chain for one choice, made for the served model

This room may import `server.text`, the server's ground modules and the engine's words.
"""
