"""Who asks: API keys, what each of them may do, and how much of it in a minute.

Reading order:

    tenant        one key's holder: a name, digests of keys, limits, models
    keys_file     the file of --api-keys-file
    key_ring      the keys that are valid now, and how they follow the file
    rates         what each tenant used in this minute, counted by all HTTP workers together
    caller        the tenant of the present request, and what the request is charged
    rate_headers  the headers that tell a client what it has left
    key_metrics   counts by the names of keys

Nothing here knows a route or a model: `http/auth.py` finds the caller of a request, and
`http/limits.py` charges it. May import the ground (server/*.py) and the words of the engine.
"""
