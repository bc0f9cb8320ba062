"""What happens to the blocks that can be found by their content, and who is told of it: clients
that route requests, and subscribers outside of this server.

Reading order:

    block_events  the events, as plain data
    kv_config     whether and where they are published
    block_feed    numbers the changes, and hands them to both; it runs in the engine's process
    kv_publisher  publishes them over ZeroMQ as vLLM does

It may import the words of the engine (the modules directly in `engine`).
"""
