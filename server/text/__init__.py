"""Between text and token ids, in both directions.

Reading order:

    tokenizer          text and chats to token ids, and token ids to text
    chat_template      a conversation rendered as the text of a prompt
    template_traits    what a chat template reads of a conversation
    template_probe     finds these traits out, by rendering
    call_probe         those of turns with calls and reasoning
    probe_renders      the renders of both, with words to look for
    template_messages  a conversation written the way that its template reads it
    client_text        control tokens that clients spelt, kept as plain text
    infill             prompts of models that fill in the middle
    bad_words          words that must not be generated, as token sequences
    detokenizer        token ids to text as they come
    stop_strings       stop strings found in that text, control tokens included
    grammar_check      grammars compiled on trial, in a child process
    torch_free         transformers imported without torch

This room may import the server's ground modules, `engine.grammar` and the engine's words.
"""
