"""Models: from a folder or a hub id to a CausalLM on its device.

Read in this order:

    loader.py            checks the configuration, reads the weights, builds the CausalLM
    assemble.py          a model from a checkpoint that quire reads by itself, and facts of weights
    model_spec.py        the model's shape and limits, from its configuration
    end_tokens.py        the tokens that end a sequence, from all of its files
    embedding_layout.py  how it makes embeddings, from its folder
    classifier_layout.py how it makes scores, from its folder
    classifier.py        the logits of a model's classes, from its hidden states
    text_part.py         the class that loads a model, and the part of it that text passes through
    causal_lm.py         a transformers model, split into body and language-model head
    probe.py             three tokens at load, which show whether and how the model can be served
    flat_proof.py        whether the flattened body computes what the model's own code computes
    outline.py           what is known of a model before it is loaded; no torch
    rehearse.py          the checks of loading, without weights
    kv_scales.py         scales of a float8 KV cache, from the checkpoint

May import: checkpoints, parallel, devices, adapters, body, attention, states, the
engine's words.
"""
