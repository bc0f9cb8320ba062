"""Links between machines: tcp, encrypted and authenticated by CURVE.

Each engine makes a pair of keys when it starts, and so does each client. Only public keys are ever
sent: the engine's supervisor passes the engine's to clients, and theirs to the engine. So a client
knows that it talks to the engine, the engine lets in nobody else, and no secret leaves its process.
The hosts of one model have a secret in common instead, of which all make the same pair.

    keys      pairs of keys, addresses, and what both ends set
    door      the end that listens
    loopback  both ends of an engine's socket in one process, to measure messages; without keys

The clients' ends are engine/fleet/network_client.py and engine/parallel/follower.py. It may import
the words of the engine.
"""
