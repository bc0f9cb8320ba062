"""The CPU's kernels, compiled by Numba: products, attention, norms, draws, a whole step."""
