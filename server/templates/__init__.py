"""Chat templates: what they read, and conversations written the way that they read them.

Reading order:

    chat_template      START HERE: a conversation rendered as the text of a prompt
    template_traits    what a chat template reads of a conversation
    template_probe     finds these traits out, by rendering
    call_probe         those of turns with calls and reasoning
    probe_renders      the renders of both, with words to look for
    template_messages  a conversation written the way that its template reads it
    call_arguments     the arguments of earlier calls, which need not be JSON
    client_text        control tokens that clients spelt, kept as plain text
    generic_tools      tools, calls and results as texts, for templates that know nothing of them
    response_template  how a tokenizer says that answers are to be read

May import the server's ground modules and the engine's words.
"""
