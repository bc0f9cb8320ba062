"""Several engines that serve the same model: which one gets a request.

Reading order:

    router          the choice: an engine's price for a request, in tokens of prefill
    kv_index        which engine has which blocks cached
    fleet_router    both together, fed by the engines' messages
    directory       where the engines are, and what of the machine each of them gets
    network_client  the client of an engine on another machine
    fleet_client    the EngineClient over all of them: choice, failover, what is asked of all

It may import engine.process (the messages, the links), engine.network (keys), engine.events,
engine.cache (the hashes of blocks) and the words of the engine. The first three do no I/O and read
no clock.
"""
