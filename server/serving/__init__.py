"""`quire serve`: the processes, their sockets and the application that they serve.

Read in this order:
    main         the main process from the bound socket to the exit; `serve` is the door
    start_screen what a person in a terminal sees of the start
    listener     the listening socket
    http_server  the application and the HTTP server of one process
    system_limits  how many open files and threads there may be
    connections  as many of them as there are descriptors for
    app          the application: routes, middleware, lifespan
    generation_defaults  sampling parameters of the model's generation_config.json
    openapi      the OpenAPI document, with example bodies
    unknown_paths  the answers to wrong paths and methods
    worker_pool  several HTTP processes in front of one engine, seen from the main process
    pool_worker  one of them, seen from the main process
    http_worker  one of them, seen from inside
    shared_counters  the memory in which all of them count

This room may import every other room of the server except bench, and of the engine only its
words, engine.checkpoints and engine.process.
"""
