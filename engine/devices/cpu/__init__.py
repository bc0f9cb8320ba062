"""The CPU as a device. Importing its modules loads Numba.

Read in this order:

    backend.py        all that the CPU does its own way
    inputs.py         the tensors of a step, made by numpy
    attention.py      cuts a step into tiles, and attends
    packing.py        weights as panels: floats, or integers of 4 and 8 bits
    decoder.py        a whole model as one compiled function, if its body is flat
    packed_linear.py  linear layers with packed weights, for all other bodies
    packed_embedding.py  embeddings with packed weights
    experts.py        the experts of a mixture, packed
    states.py         the operations of layers that keep a state
    adapters.py       the LoRA adapters that run, for both kinds of body
    draws.py          argmax and draws
    memory.py         the KV cache in main memory
    first_start.py    what comes before the engine's slow imports

May import: the rooms that engine.devices may, kernels.cpu, and below it
kernels.cpu.integer, kernels.cpu.latent, kernels.cpu.lora and kernels.cpu.states.
"""
