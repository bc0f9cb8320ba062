"""Attention over paged K and V, as Triton kernels."""
