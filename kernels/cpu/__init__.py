"""Kernels for the CPU, compiled by Numba: products, attention, norms, draws, and a whole step.

Read them in this order:

    kernel.py     what a kernel is, and how it gets its arguments
    region.py     how threads run kernels, in phases
    step.py       what a step reads and writes
    body.py       a model's step as a table of phases
    products.py, norms.py, attention.py, sampling.py   the kernels
    panels.py, softmax.py, vectors.py, numbers.py      what they are made of
    ahead.py, arrays.py                                when they are compiled, how tensors get in
    integer                                            a room of its own: weights of 4 or 8 bits
    states                                             another: layers that keep a state

docs/cpu.md is about the whole. This room imports numba, llvmlite, numpy, torch (only in arrays.py),
tqdm and `quire.kernels`.
"""
