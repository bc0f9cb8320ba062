"""Structured output: grammars compiled by llguidance, and the token masks of a step.

A constrained request brings a grammar: a JSON schema, a regular expression, a list of choices, a
context-free grammar or structural tags. Each step, every constrained row gets a bitmask of the
tokens that may follow, which the sampler applies to the logits. The bitmask is filled in a thread
while the device computes the forward pass.

Reading order:

    compile      from a request's grammar and a tokenizer.json to a matcher of llguidance
    masks        the matchers of all requests, and the bitmask of each step
    slow_rows    which grammars are at fault if masks take long
    bad_words    the tokens that would complete a bad word
    constraints  both, and budgets of reasoning (../reasoning.py), as a step's SamplingConstraints

It may import checkpoints, the words of the engine (the modules directly in `engine`), and numpy.
llguidance is imported only when the first constrained request comes.
"""
