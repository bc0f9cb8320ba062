"""Speculative decoding that changes nothing but the time: drafts, verified by the one step.

A draft is a guess of the next tokens of a sequence. The step computes them as it would compute a
chunk of a prompt, and samples after each. quire's draw is a pure function of the logits, the seed,
the position, the parameters and the tokens before, so a draft is accepted exactly if it equals that
draw, and the output is the one without drafts, whoever made them (docs/speculation.md).

Read in this order:

    drafter.py      the protocol: propose(sequence, k) -> list[int]
    ngram.py        the sequence's own text
    prediction.py   the text that the client expects
    grammar.py      the tokens that a grammar leaves no choice about
    cached.py       the tokens that another sequence with the same prefix went on with
    model.py        a small model, which the worker runs beside the served one
    acceptance.py   how far the drafts of a sequence were right so far
    step_cost.py    what a step of so many tokens costs
    speculator.py   START HERE: chooses the drafts of a step by both

May import: cache, the engine's words. It is free of torch.
"""
