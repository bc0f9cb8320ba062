"""From logits to tokens on a GPU.

    best_tokens.py      the likeliest tokens, and which rows are finite
    sample_tokens.py    temperature, top_k, top_p, min_p and the draw
    sampling_passes.py  its passes over the logits

May import: kernels.cuda, kernels.
"""
