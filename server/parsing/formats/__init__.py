"""The formats in which models write tool calls, one family a file.

To add one: a file with a parser and a `FORMATS` of `ToolFormat`, its line in tool_formats.py, its
names in `ToolCallParser` (server/format_names.py), and its samples in tests/server/parsing/samples.

Reading order:

    tagged_json        objects or lists of JSON between tags: Hermes and its kin; begin here
    llama              objects of JSON without closing tags
    mistral            Mistral's calls, of all generations
    deepseek           DeepSeek V3, R1 and V3.1
    kimi               Kimi K2
    tagged_parameters  each argument between tags: Qwen3-Coder, GLM, MiniMax M2
    pythonic           calls as in Python: Llama 4, Gemma 3, OLMo 3, LFM2
    gemma              FunctionGemma and Gemma 4
    harmony            gpt-oss's format, in which reasoning and calls are both messages
    response_template  whatever the model's tokenizer describes
    tool_formats       all of them by name, and which one a chat template shows
    reasoning_marks    the marks of reasoning as tokens
    message_format     the formats of the served model, and its whole chain of parsers

This room may import `server.parsing`, `server.text`, the server's ground modules and the engine's
words.
"""
