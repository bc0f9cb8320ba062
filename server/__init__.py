"""The HTTP server: an OpenAI-compatible API in front of an engine process.

The ground floor, these files, may be imported by every room:
    cli          the command `quire`; it imports the rooms lazily
    about        name and version of the distribution
    settings     every setting of `quire serve`; flags_table writes their table into docs/api.md
    setting_sources  flags, environment and file: which one gives a setting
    setting_types    names of the formats of tool calls and reasoning; keys
    foreign_flags    other servers' flags, and what takes their place
    errors       exceptions to HTTP answers
    validation   what is wrong with a body, in words for people
    logs         the log
    json_text    JSON of answers

The rooms, each of which may import only those below it in this list, and the ground floor:
    serving      processes, sockets, the application; begin reading at serving.main
    scoring      /v1/rerank, /v1/score and /v1/classify
    dialects     /v1/responses and /v1/messages, translated to chats
    api          the other endpoints
    requests     from a body to engine requests and back to text
    tracing      OpenTelemetry traces
    http         sockets, streams, limits, keys
    tenants      who asks: keys, their limits, what they have used
    metrics      the page /metrics
    parsing      reasoning and tool calls in the model's text
    text         tokenizer, detokenizer
    templates    chat templates
    web          static pages
    bench        `quire bench`
    commands     the other commands: chat, complete, models, doctor, completion

Of the engine, the server may import only its words, engine.process and engine.grammar; serving may
also import engine.checkpoints, bench engine.bench, and commands, lazily, engine.checkpoints and
engine.model.
"""
