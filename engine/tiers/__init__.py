"""Evicted KV blocks in host memory and on disk, from where a later match brings them back.

When the pool reuses a cached block for something else, its K/V is copied to host memory first,
under the same hash. What host memory gives up goes to a store below it: a folder, or whatever
implements the four methods of `BlockStore`. Before a sequence is admitted, blocks that it needs are
brought back into free blocks of the pool, where it finds them as it finds all cached blocks.

Reading order:

    block_store    the protocol of a store: contains, load, store, close
    sealed_block   a block as a record that proves what it is
    host_store     blocks in the slots of host memory
    disk_store     blocks as files of a folder
    lower_tier     a store below host memory, with its threads
    transfer_cost  whether loading a block is faster than computing it
    block_tier     all together, as the scheduler uses them
    readmission    which blocks of waiting sequences come back, and when
    open_tier      makes them as the configuration asks

It may import cache and the words of the engine; no torch.
"""
