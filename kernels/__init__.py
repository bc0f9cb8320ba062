"""The numeric kernels of a step, without any knowledge of the engine or the server.

Begin with `reference.py`: one function per GPU kernel in plain torch, with the same signature. It
is the oracle of every test and the shortest statement of what a kernel computes. Then read

    reference_experts.py, reference_inputs.py, reference_states.py
                       parts of it: mixtures of experts, a step's layout, layers that keep a state
    checks.py          what every Triton launcher refuses: shapes, dtypes, layouts, devices
    prefix_groups.py   which sequences of a decode batch share a prefix that is worth reading once
    cache_folder.py    where compiled kernels are kept
    device_copy.py     host values to the device without waiting for it
    cuda/              Triton kernels for NVIDIA GPUs; cuda/attention/ is paged attention
    cpu/               Numba kernels for the CPU

Nothing here imports the engine or the server. `cuda` and `checks` need Triton and `cpu` needs
Numba, so callers import them only for the device that they serve.
"""
