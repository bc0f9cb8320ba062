"""CUDA as a device. Importing its modules loads Triton.

Read in this order:

    backend.py          all that CUDA does its own way; the measurement of memory
    kernels.py          the kernels that it launches, as one value that tests replace
    inputs.py           the tensors of a step, made by one copy and one kernel
    attention.py        plans a step, and attends
    shared_prefixes.py  which decodes read a shared prefix once
    products.py         chooses the products of weights that have 4 or 8 bits
    body_ops.py         the operations of a flat body
    adapters.py         the slots of LoRA adapters
    decode_graphs.py    CUDA graphs of decode steps
    draws.py            draws
    memory.py           a GPU's memory
    host_blocks.py      copies blocks of the KV cache to host memory, and back
    requirements.py     which GPUs, and which releases of Triton, are refused

May import: the rooms that engine.devices may, and kernels.cuda.
"""
