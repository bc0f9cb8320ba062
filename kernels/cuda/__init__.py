"""The Triton kernels that a step launches on an NVIDIA GPU, one operation per file.

Each file holds the kernel and its launcher, which raises ValueError for tensors that do not fit.
docs/kernels.md has each kernel's grid, limits and compiled resources. In the order of a step:

    prepare_inputs.py     token ids, positions, slots and block tables from one upload
    copy_blocks.py        copy-on-write of KV blocks
    rms_norm.py           RMSNorm, also fused with the residual addition
    rope_and_cache.py     rotary embedding and the KV cache write in one launch
    reshape_and_cache.py  the KV cache write alone
    attention/            paged attention: prefill, decode, shared prefixes
    silu_and_mul.py       the activation of the gated MLP
    states/               layers that keep a state: the short convolution, the recurrence
    lora.py               what LoRA adapters add to a product, for many adapters in one step
    grouped_product.py    products with weights of 4 and 8 bits
    run_experts.py        the experts of a mixture, as two grouped products
    sort_by_expert.py     the rows of each expert, in tiles, for that
    sampling/             the likeliest tokens, and draws

    dependent_launch.py   kernels that start before the one before them has ended
    fp8.py                the float8 KV cache: conversions that several kernels share
    tuning.py             tile shapes by head size, dtype and GPU

Imports only `quire.kernels` (checks, prefix_groups), torch and Triton.
"""
