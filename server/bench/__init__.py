"""`quire bench`: measures any OpenAI-compatible server over HTTP, or the engine alone.

Read in this order:
    command    the command line; `serve` is measured here, the other two in engine.bench
    arguments  the flags of `quire bench serve`
    measure    warm up, run at each rate, print
    dataset    prompts, lengths and arrival times
    load       sends the requests at their times
    http       the HTTP client (aiohttp, the extra `bench`)
    stream     reads one streamed answer into a record
    report     numbers, JSON and table of a run
    plot       the SVG
    planning      the command line of `quire plan`
    plan_report   its table, JSON and plot
    serving_runs  the runs against a server by which it is calibrated

This room may import the server's ground files (server/*.py), engine.bench, engine.plan and the
engine's words; lazily server.text, engine.runner and engine.model.
"""
