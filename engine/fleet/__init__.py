"""Several engines that serve the same model: which one gets a request.

Reading order:

    router        the choice: an engine's price for a request, in tokens of prefill
    kv_index      which engine has which blocks cached
    fleet_router  both together, fed by the engines' messages

It may import engine.process (the messages), engine.events, engine.cache (the hashes of blocks) and
the words of the engine. Nothing here does I/O or reads a clock.
"""
