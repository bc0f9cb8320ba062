"""Devices: everything that the CPU and CUDA do differently.

A worker chooses one backend at load and hands it on; no code outside this room asks what device it
runs on. A third device is one more folder, a line in choose.py, and its name in `config.Device`.

Read in this order:

    backend.py          the protocols that a device implements
    steps.py            a step's layout, on the host and on the device
    host_blocks.py      blocks in slots of host memory, and their copies
    streamed_blocks.py  the same copies beside the steps of a device with memory of its own
    choose.py           which backend a configuration asks for
    cpu/                the CPU, with kernels compiled by Numba
    cuda/               CUDA, with Triton kernels and CUDA graphs

May import: sampling, adapters, body, attention, states, kernels, the engine's words. Only cpu/
imports kernels.cpu, and only cuda/ imports kernels.cuda.
"""
