"""Links between machines: tcp, encrypted and authenticated by CURVE.

Each engine makes a pair of keys when it starts, and so does each client. Only public keys are ever
sent: the engine's supervisor passes the engine's to clients, and theirs to the engine. So a client
knows that it talks to the engine, the engine lets in nobody else, and no secret leaves its process.

    keys   pairs of keys, addresses, and what both ends set
    door   the engine's end

The clients' end is engine/fleet/network_client.py. It may import the words of the engine.
"""
