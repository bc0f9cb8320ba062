"""Between text and token ids, in both directions.

Reading order:

    tokenizer          text and chats to token ids, and token ids to text
    spelling           tokens as the bytes that they add to a text
    infill             prompts of models that fill in the middle
    bad_words          words that must not be generated, as token sequences
    detokenizer        token ids to text as they come
    stop_strings       stop strings found in that text, control tokens included
    grammar_check      grammars compiled on trial, in a child process
    torch_free         transformers imported without torch

This room may import `server.templates`, the server's ground modules, `engine.grammar` and the
engine's words.
"""
