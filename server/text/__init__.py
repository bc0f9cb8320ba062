"""Between text and token ids, in both directions.

Reading order:

    tokenizer        text and chats to token ids, and token ids to text
    chat_template    a conversation rendered as the text of a prompt
    template_calls   tool calls of earlier turns, in the form that a template reads
    call_arguments   their arguments, which may be broken
    infill           prompts of models that fill in the middle
    bad_words        words that must not be generated, as token sequences
    detokenizer      token ids to text as they come, and stop strings
    grammar_check    grammars compiled on trial, in a child process
    torch_free       transformers imported without torch

This room may import the server's ground modules, `engine.grammar` and the engine's words.
"""
