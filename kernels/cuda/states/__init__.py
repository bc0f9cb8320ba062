"""The operations of layers that keep a state, as Triton kernels: one slot of states for each row.

    causal_conv.py         the short causal convolution
    gated_recurrence.py    linear attention with a decay (Mamba-2), and with the delta rule
    chunked_recurrence.py  the same for prompts, a chunk of tokens at a time

Read them in this order. `reference_states.py`, two folders up, is what the kernels must compute.
Imports only `quire.kernels` (checks), `quire.kernels.cuda` (tuning), torch and Triton.
"""
