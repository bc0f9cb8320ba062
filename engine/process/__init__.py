"""The engine in a process of its own, and the clients through which the HTTP processes reach it.

The process that starts the engine also supervises it (ProcessEngineClient): it watches for stalls,
restarts a crashed engine, and then lets its open streams go on. With several HTTP workers, the
others attach to the same engine (AttachedEngineClient).

Reading order:

    wire             the messages, and who sends them when
    engine_process   main of the engine's process: steps one core, serves its clients
    adapter_changes  LoRA adapters loaded and unloaded for clients, and who knows of it
    engine_handle    the client's end: starts the process, talks to it, stops it
    stream, streams  the open requests of a client: outputs come by step, leave by request, and go
                     on at another engine if theirs dies
    remote_client    what the clients share
    process_client   the client that supervises the engine
    attached_client  the client of an engine that another process supervises
    live_views       snapshots for clients that watch the engine: when, and to whom
    live_feed        the client's end of it
    json_logs        the log as JSON, and libraries' logs, for this process and the server's
    heap             memory housekeeping after the start
    private_folder   the folder of the engine's socket

It may import events and the words of the engine (the modules directly in `engine`). The engine's
process also imports core, runner and devices, lazily, in `build_core`.
"""
