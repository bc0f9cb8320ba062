"""CUDA as a device. Importing its modules loads Triton.

Read in this order:

    backend.py          all that CUDA does its own way; the measurement of memory
    layers/             the kernels that it launches, and what runs in the place of a model's layers
    inputs.py           the tensors of a step, made by one copy and one kernel
    attention.py        plans a step, and attends
    shared_prefixes.py  which decodes read a shared prefix once
    body_ops.py         the operations of a flat body
    rehearsing.py       compiles kernels and captures graphs before the first request
    step_graphs.py      CUDA graphs of steps
    mixed_graphs.py     which steps with prompts are captured, and how they are padded
    draws.py            draws
    memory.py           a GPU's memory
    requirements.py     which GPUs, and which releases of Triton, are refused

May import: its room layers, and the rooms that engine.devices may, and kernels.cuda.
"""
