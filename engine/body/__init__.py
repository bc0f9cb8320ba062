"""A model's body: its layers, from token ids to hidden states.

Read in this order:

    flat_decoder.py   Llama on one page: the layers as one function over a device's operations
    rotary_table.py   rotary factors of all positions, computed once
    flatten.py        reads that function's weights out of a transformers model
    merged_linear.py  merges projections that share an input into one product, before that
    grouped_linear.py weights that stay in the 4 or 8 bits of a quantised checkpoint
    grouped_rows.py   embeddings and experts whose weights stay so
    chosen_experts.py experts that scale their inputs, of which only the chosen ones run: Llama 4's
    latent_layers.py  layers whose heads share a latent, and products with it
    body.py           the Body protocol, and its kinds: transformers' own code, or a flat decoder

May import: attention, kernels.
"""
