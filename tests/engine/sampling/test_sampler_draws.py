"""Test that draws follow the distribution that the filters leave, and are reproducible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quire.engine.step import SequenceSpec

from ..sampling_rows import make_sampler, make_sequence, softmax_after_filters

VOCAB = 50
DRAWS = 20_000


def draw_many(logits: torch.Tensor, params: dict[str, Any], axis: str) -> torch.Tensor:
    """Draw DRAWS times from one row of logits, each time with another seed or position."""
    sampler = make_sampler(VOCAB)
    sequences: list[SequenceSpec] = []
    positions = [3] * DRAWS
    if axis == "seeds":
        sequences = [make_sequence(own_seed=i, **params) for i in range(DRAWS)]
    else:
        sequences = [make_sequence(own_seed=11, **params) for _ in range(DRAWS)]
        positions = list(range(3, 3 + DRAWS))
    batch = sampler.prepare(sequences, positions)
    return sampler(logits.expand(DRAWS, -1), batch).token_ids


@pytest.mark.parametrize("axis", ["seeds", "positions"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 12},
        {"top_p": 0.8},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.4},
        {"min_p": 0.05, "top_p": 0.95},
        {"logit_bias": ((3, 2.0),), "allowed_token_ids": tuple(range(25))},
    ],
    ids=str,
)
def test_frequencies_match_the_filtered_softmax(params: dict[str, Any], axis: str) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    expected = softmax_after_filters(logits, make_sequence(**params)) * DRAWS
    counts = torch.bincount(draw_many(logits, params, axis), minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    present = expected > 0
    assert (counts[present] > 0).sum() >= (expected > 10).sum()
    statistic = float(((counts - expected)[present] ** 2 / expected[present]).sum())
    freedom = int(present.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_flat_vocabulary_of_usual_size() -> None:
    """With 152k equal tokens, the race must resolve probabilities far below float32's step at 1."""
    vocab = 151_936
    sampler = make_sampler(vocab)
    sequences = [make_sequence(own_seed=i) for i in range(400)]
    tokens = sampler(torch.zeros(400, vocab), sampler.prepare(sequences)).token_ids
    assert len(tokens.unique()) >= 395
    assert abs(float(tokens.double().mean()) / vocab - 0.5) < 4 * math.sqrt(1 / 12 / 400)


def test_a_seed_reproduces_its_stream() -> None:
    def stream(seed: int) -> list[int]:
        sampler = make_sampler(VOCAB)
        sequence = make_sequence(own_seed=seed)
        logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1))
        for row in logits:
            tokens = sampler(row.unsqueeze(0), sampler.prepare([sequence])).token_ids
            sequence.token_ids.append(int(tokens))
        return sequence.token_ids

    assert stream(5) == stream(5)
    assert stream(5) != stream(6)


@pytest.mark.parametrize("params", [{}, {"top_k": 10}, {"top_p": 0.9}], ids=str)
def test_n_choices_of_one_request_are_independent(params: dict[str, Any]) -> None:
    """Neighbouring seeds at one position agree as often as independent draws do."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))
    probabilities = softmax_after_filters(logits, make_sequence(**params))
    agree = float((probabilities**2).sum())
    tokens = draw_many(logits, params, "seeds")
    share = float((tokens[1:] == tokens[:-1]).double().mean())
    assert abs(share - agree) < 4 * math.sqrt(agree / DRAWS)
