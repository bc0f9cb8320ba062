"""The operations of layers that keep a state, on the CPU: one slot of states for each sequence.

Read in this order:

    convolution.py  the short causal convolution
    recurrence.py   linear attention with a decay (Mamba-2), and with the delta rule

Both go through a row's tokens one after the other, in the same order of sums whatever else is in
the step and wherever a prompt is cut. `reference_states.py`, two folders up, is what they compute.
Imports numpy, Numba and `quire.kernels.cpu`.
"""
