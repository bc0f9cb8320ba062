"""Which layers of a model share block tables, and how many blocks that takes. Needs no torch.

    layer_groups    the groups of layers, and the blocks that sequences take in them
    kv_lines        how K and V of layers with different heads lie in blocks that are alike
    attention_shape the numbers of heads, and their dimensions, with which layers attend
    latent_heads    heads whose keys and values are made of one latent

Everyone may import it, as they may the words of the engine. It imports only those.
"""
