"""How the engine's flags are declared, and groups of them that `EngineConfig` inherits.

Reading order:

    flag        one flag: its field, help, bounds and name
    parallel    how many processes run one model, and where
    offloading  where the KV blocks go that the cache gives up

May import: the engine's words. In turn `engine/config.py` imports this room.
"""
