"""Attention over the paged KV cache as Triton kernels.

    attend_tiles.py            online softmax over tiles of keys, shared by the three kernels below
    paged_attention_extend.py  many new tokens per sequence: prefill and chunks of it
    decode_schedule.py         which program of the decode kernel reads which keys
    paged_attention_decode.py  one or a few new tokens per sequence, keys split over the GPU
    cascade.py                 a prefix that several sequences share, read once for all of them

Read them in this order. `reference.py`, two folders up, is what the kernels must compute. Imports
only `quire.kernels` (checks, prefix_groups), `quire.kernels.cuda` (fp8, tuning), torch and Triton.
"""
