"""The commands of `quire` beside `serve` and `bench`. Each is imported only when it is run.

Read in this order:
    arguments    the command lines of chat, complete, doctor and completion
    chat         `quire chat`: the loop of questions and answers
    conversation     messages and parameters, and the file that they are saved in
    slash        what /commands do to a conversation
    reader       lines from a terminal, with history, or from a pipe
    complete     `quire complete`: one prompt, one answer
    answer       prints an answer as it arrives, and counts its tokens
    http_client  requests to a server, and its streams
    local_server     finds a running server, or starts one and stops it at the end
    models       `quire models`
    effective    `quire serve --print-config`
    doctor       `quire doctor`: prints the checks of doctor_checks
    completion   completion of command lines in shells

This room may import the ground floor and the engine's words; models and doctor also import, lazily,
server.text, engine.checkpoints and engine.model.
"""
