"""Models: from a folder or a hub id to a CausalLM on its device.

Read in this order:

    loader.py            checks the configuration, reads the weights, builds the CausalLM
    model_spec.py        the model's shape and limits, from its configuration
    embedding_layout.py  how it makes embeddings, from its folder
    causal_lm.py         a transformers model, split into body and language-model head
    probe.py             three tokens at load, which show whether and how the model can be served
    kv_scales.py         scales of a float8 KV cache, from the checkpoint

May import: devices, adapters, body, attention, the engine's words.
"""
