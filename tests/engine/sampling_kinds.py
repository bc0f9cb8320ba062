"""Kinds of sampling that differential tests put requests through."""

from __future__ import annotations

from typing import Any

SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 5, "logprobs": 0, "logprob_token_ids": (9, 4)},
    {"temperature": 1.3, "min_p": 0.05, "frequency_penalty": 0.6},
    {"temperature": 1.0, "presence_penalty": 0.7, "logit_bias": ((5, 4.0), (9, -3.0))},
    {"temperature": 1.0, "bad_words": ((7,), (11, 12), (3, 4, 5)), "top_k": 12},
    {"temperature": 1.2, "stop_token_ids": (17, 23, 40, 61), "min_tokens": 6},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(3, 40)), "n": 3},
    {"temperature": 0.7, "n": 2, "prompt_logprobs": 1, "logprobs": 2},
)
"""For tokens below 128."""
GRAMMAR_SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.95, "n": 2},
    {"temperature": 1.0, "min_tokens": 9, "logprobs": 1},
    {"temperature": 1.2, "ignore_eos": True, "bad_words": ((270,), (301, 302))},
)
"""For requests with a grammar, whose vocabulary is larger."""
