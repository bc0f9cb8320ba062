"""Attention over the paged KV cache, as far as it is the same on every device.

Read in this order:

    metadata.py      the layout of a step that every layer's attention reads, and the AttentionPlan
                     that a device makes of it
    layer_traits.py  what the attention of a layer does that its module does not ask for
    interface.py     the function that transformers' models call in place of their own attention
    latent.py        the same for layers whose heads share a latent

The attention itself is the device's: engine/devices/cpu/attention.py and
engine/devices/cuda/attention.py.

May import: states, kernels (not kernels.cpu or kernels.cuda), the engine's words.
"""
