"""Sampling: from logits to one token per row, on the device.

Given a row's logits, its token depends only on the request's parameters, its seed and the position:
neither the other rows of the batch nor a preemption can change it. For that, random numbers are
hashes of counters, ties between equal logits go to the lower token id, and no result depends on the
order of a floating-point sum.

Reading order:

    sampler        masks, bias, penalties, temperature, top-k, top-p, min-p, and the draw
    plan           which of these operations each row needs, with their parameters as tensors
    batch          the plan of a step, with what changes from step to step
    token_history  the tokens of penalised sequences, kept on the device
    counter_rng    random numbers as a pure function of (seed, position, token id)
    top_tokens     the k largest logits, with ties broken by token id
    logprobs       log-probabilities at given tokens, and their form on the host

It may import the words of the engine (the modules directly in `engine`) and `kernels`.
"""
