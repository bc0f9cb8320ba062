"""A model's text, read as a message: its reasoning, its content and its tool calls.

Parsers are incremental: they take text in pieces and return events, and the events add up to the
same message however the text was cut. Streamed and whole answers use the same parsers.

Reading order:

    message_events      the events, and how they add up to a message
    json_scanner        where a JSON value ends, made valid JSON on the way
    reasoning           `<think>…</think>` separated from the answer
    answer_parser       the base of the parsers of tool calls: begin here, it explains how they work
    tool_parser         calls amid content
    json_calls          calls written as JSON objects
    schema_values       values written as bare text, typed by the schema of the tool
    parameter_calls     calls whose arguments stand between tags, one by one
    python_calls        calls written as in Python
    call_shape          how a format's calls are written, for grammars
    tool_format         the protocol of a format; the formats are in `server.parsing.formats`
    calls_or_answer     an answer that is either calls or a structured text
    unclosed_reasoning  calls in reasoning that is never closed
    message_parser      the chain of parsers for one choice

This room may import `server.text`, the server's ground modules and the engine's words.
"""
