"""Attention on the CPU to latents: one KV head for all heads, whose values are part of its keys.

    attention.py  stores a step's latents, and attends to all of them

`engine/layers/latent_heads.py` says what latents are. Imports numpy, Numba and `quire.kernels.cpu`.
"""
