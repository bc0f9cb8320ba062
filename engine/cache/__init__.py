"""Block tables over one pool of KV blocks: allocation, prefix sharing, copy-on-write.

The K/V of all sequences lies in equal blocks of one pool on the device. This room decides which
block belongs to which sequences and finds those that can be shared; it never touches the K/V
itself, and needs no torch. The scheduler calls it, and passes the copies that it asks for on to
the worker.

Reading order:

    block_hashes    the hashes by which full blocks are known, here and in whoever routes requests
    block_pool      reference counts, and the order in which free blocks are reused
    prefix_index    the index of blocks by their tokens
    evicted_blocks  the protocol of whoever keeps the content of blocks that the pool reuses
    block_recorder  which blocks become known and are lost, for those who follow it
    state_slots     the slots of states, and snapshots of states by the hashes of blocks
    block_manager   both together, as the scheduler uses them: match, allocate, fork, free
    grouped_block_manager
                    the same for several groups of layers, some of which have a window

It may import events and the words of the engine (the modules directly in `engine`).
"""
