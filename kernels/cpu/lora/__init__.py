"""LoRA adapters (arXiv 2106.09685) on the CPU, for many adapters in one step.

Read in this order:

    slots.py    the weights of the adapters that run, packed into panels
    deltas.py   the kernel that adds B A x, and the phases of a whole step

Imports numpy and `quire.kernels.cpu`.
"""
