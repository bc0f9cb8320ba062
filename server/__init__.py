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
    ray_app      `quire deploy`: fronts and engines under Ray Serve
    serving      processes, sockets, the application; begin reading at serving.main
    live         the page at /, and the events of its live view
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
    bench        `quire bench` and `quire plan`
    commands     the other commands: chat, complete, models, doctor, completion

Of the engine, most rooms may import only its words, engine.process and engine.grammar. Serving,
ray_app, bench and commands may import more; tests/test_rooms.py has the table.
"""
