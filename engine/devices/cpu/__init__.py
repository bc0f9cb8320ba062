"""The CPU as a device. Importing its modules loads Numba.

Read in this order:

    backend.py        all that the CPU does its own way
    inputs.py         the tensors of a step, made by numpy
    attention.py      cuts a step into tiles, and attends
    decoder.py        a whole model as one compiled function, if its body is flat
    packed_linear.py  linear layers with packed weights, for all other bodies
    adapters.py       the LoRA adapters that run, for both
    draws.py          argmax and draws
    memory.py         the KV cache in main memory
    first_start.py    what comes before the engine's slow imports

May import: the rooms that engine.devices may, kernels.cpu and kernels.cpu.lora.
"""
