"""CUDA as a device. Importing its modules loads Triton.

Read in this order:

    backend.py          all that CUDA does its own way; the measurement of memory
    kernels.py          the kernels that it launches, as one value that tests replace
    inputs.py           the tensors of a step, made by one copy and one kernel
    attention.py        plans a step, and attends
    shared_prefixes.py  which decodes read a shared prefix once
    products.py         chooses the products of weights that have 4 or 8 bits
    experts.py          the experts of mixtures, run by one kernel
    body_ops.py         the operations of a flat body
    states.py           the operations of layers that keep a state
    adapters.py         the slots of LoRA adapters
    rehearsing.py       compiles kernels and captures graphs before the first request
    step_graphs.py      CUDA graphs of steps
    mixed_graphs.py     which steps with prompts are captured, and how they are padded
    draws.py            draws
    memory.py           a GPU's memory
    requirements.py     which GPUs, and which releases of Triton, are refused

May import: the rooms that engine.devices may, and kernels.cuda.
"""
