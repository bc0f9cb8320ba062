"""Compare each parameter with transformers' processors or its formula, and rows with each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.errors import InvalidRequestError
from quire.engine.sampling.sampler import Sampler
from quire.engine.step import SequenceSpec

from ..sampling_rows import (
    CPU,
    EOS,
    PARAMETERS,
    VOCAB,
    expected_token,
    make_sampler,
    make_sequence,
    rows,
    sample,
    softmax_after_filters,
)


def kept(logits: torch.Tensor, sequence: SequenceSpec, draws: int = 3000) -> set[int]:
    """Find the tokens that a row can draw, by drawing with many seeds."""
    sampler = make_sampler(len(logits))
    params = sequence.sampling_params
    sequences = [make_sequence(own_seed=s)._replace(sampling_params=params) for s in range(draws)]
    return set(sample(logits.expand(draws, -1), sequences, sampler).token_ids.tolist())


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_parameter_agrees_with_its_oracle(params: dict[str, Any]) -> None:
    logits = rows(48)
    logits[:, EOS] += 4  # so that min_tokens has something to suppress
    sequences = [
        make_sequence(prompt=(1, 5, 9, 5), output=(7, 7, 30, 5, 7), own_seed=i, **params)
        for i in range(len(logits))
    ]
    output = sample(logits, sequences)
    assert output.finite.all()
    expected = [expected_token(row, s) for row, s in zip(logits, sequences, strict=True)]
    assert output.token_ids.tolist() == expected


@st.composite
def sampling_parameters(draw: st.DrawFn) -> dict[str, Any]:
    tokens = st.integers(0, VOCAB - 1)
    return draw(
        st.fixed_dictionaries(
            {
                "prompt": st.lists(tokens, min_size=1, max_size=12),
                "output": st.lists(tokens | st.integers(0, 3), max_size=12),
                "own_seed": st.integers(-(2**63), 2**63 - 1),
                "temperature": st.sampled_from([0.0, 0.2, 1.0, 1.7]),
                "top_k": st.sampled_from([0, 1, 2, 30, 96, 200]),
                "top_p": st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
                "min_p": st.sampled_from([0.0, 0.01, 0.3]),
                "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
                "presence_penalty": st.sampled_from([-1.0, 0.0, 1.0]),
                "frequency_penalty": st.sampled_from([-0.3, 0.0, 0.6]),
                "min_tokens": st.sampled_from([0, 6]),
                "logit_bias": st.sampled_from([(), ((3, 5.0), (4, -100.0))]),
                "bad_words": st.lists(
                    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=6
                ).map(tuple),
                "allowed_token_ids": st.one_of(
                    st.none(), st.lists(tokens, min_size=2, max_size=9, unique=True).map(tuple)
                ),
            }
        )
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(sampling_parameters(), min_size=1, max_size=6), st.integers(0, 2**32))
def test_any_mixture_agrees_with_the_oracle(batch: list[dict[str, Any]], seed: int) -> None:
    logits = rows(len(batch), seed)
    sequences = [make_sequence(**params) for params in batch]
    output = sample(logits, sequences)
    for row, sequence in enumerate(sequences):
        probabilities = softmax_after_filters(logits[row], sequence)
        if not output.finite[row]:  # min_tokens forbids all that allowed_token_ids leaves
            assert probabilities.isnan().all()
        else:
            assert int(output.token_ids[row]) == expected_token(logits[row], sequence)


def test_a_row_with_nothing_left_to_draw_is_flagged() -> None:
    sequences = [
        make_sequence(allowed_token_ids=(EOS,), min_tokens=3),
        make_sequence(temperature=0.0, allowed_token_ids=(EOS,), min_tokens=3),
        make_sequence(allowed_token_ids=(EOS,)),
    ]
    logits = rows(4)
    logits[3] = -torch.inf
    output = sample(logits, [*sequences, make_sequence(temperature=0.0)])
    assert output.finite.tolist() == [False, False, True, False]
    assert int(output.token_ids[2]) == EOS


def test_min_tokens_ends_at_its_position() -> None:
    sampler = make_sampler(VOCAB)
    logits = torch.zeros(2, VOCAB)
    logits[:, EOS], logits[:, 9], logits[:, 4] = 9.0, 8.0, 7.0
    first = make_sequence(temperature=0.0, min_tokens=2, stop_ids=(EOS, 9, VOCAB + 5))
    second = make_sequence(temperature=0.0, min_tokens=1)
    drawn = []
    for _ in range(4):
        tokens = sampler(logits, sampler.prepare([first, second])).token_ids.tolist()
        drawn.append(tokens)
        first.token_ids.append(tokens[0])
        second.token_ids.append(tokens[1])
    assert drawn == [[4, 9], [4, EOS], [EOS, EOS], [EOS, EOS]]


def test_a_bad_word_is_forbidden_where_it_would_be_completed() -> None:
    """Words are matched in the output only; tokens of one word may complete another."""
    sampler = make_sampler(VOCAB)
    logits = torch.zeros(1, VOCAB)
    logits[0, :8] = torch.arange(8, 0, -1)  # 0 is the likeliest, then 1, …
    sequence = make_sequence(
        prompt=(5, 0), temperature=0.0, bad_words=((0, 0), (0, 1, 2), (2, 0, 1, 0), (1, 1))
    )
    for _ in range(8):
        sequence.token_ids.append(int(sample(logits, [sequence], sampler).token_ids))
    assert sequence.token_ids[2:] == [0, 1, 0, 1, 0, 1, 0, 1]
    sequence = make_sequence(prompt=(5, 0), temperature=0.0, bad_words=((0, 0), (1, 0), (0, 1)))
    for _ in range(6):
        sequence.token_ids.append(int(sample(logits, [sequence], sampler).token_ids))
    assert sequence.token_ids[2:] == [0, 2, 0, 2, 0, 2]


@pytest.mark.parametrize("words", [((),), ((1,) * 257,), ((1,),) * 257])
def test_too_many_bad_words_are_refused(words: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        make_sequence(bad_words=words)
    assert refused.value.param == "bad_words"


def test_logits_of_another_shape_are_refused() -> None:
    sampler = make_sampler(VOCAB)
    with pytest.raises(ValueError, match="logits"):
        sampler(rows(2), sampler.prepare([make_sequence()]))


def test_the_cpu_kernels_draw_the_same_tokens_as_torch() -> None:
    sequences = [make_sequence(own_seed=i, **params) for i, params in enumerate(PARAMETERS * 8)]
    logits = rows(len(sequences))
    plain = Sampler(VOCAB, CPU)
    expected = plain(logits, plain.prepare(sequences)).token_ids
    assert sample(logits, sequences).token_ids.equal(expected)


def test_tiny_top_p_keeps_the_argmax() -> None:
    logits = rows(20)
    for params in ({"top_p": 1e-12}, {"top_p": 1e-12, "top_k": 40}):
        sequences = [make_sequence(own_seed=i, **params) for i in range(20)]
        assert sample(logits, sequences).token_ids.equal(logits.argmax(dim=1))


def test_ties_at_a_cut() -> None:
    """top_k keeps exactly k, lower ids first; a nucleus over the vocabulary keeps all equals."""
    flat = torch.zeros(VOCAB)
    assert kept(flat, make_sequence(top_k=5)) == {0, 1, 2, 3, 4}
    assert kept(flat, make_sequence(top_k=1)) == {0}
    assert kept(flat, make_sequence(top_k=6, top_p=0.5)) == {0, 1, 2}
    assert kept(flat, make_sequence(top_p=0.01)) == set(range(VOCAB))
    peaks = torch.full((VOCAB,), -30.0)
    peaks[[90, 80, 70, 60]] = torch.tensor([2.0, 2.0, 1.0, 1.0])
    assert kept(peaks, make_sequence(top_k=1)) == {80}
    assert kept(peaks, make_sequence(top_k=3)) == {60, 80, 90}
    assert kept(peaks, make_sequence(top_p=0.5)) == {80, 90}
    assert kept(peaks, make_sequence(top_p=0.8)) == {60, 70, 80, 90}


def test_top_p_at_the_exact_boundary() -> None:
    """Of the masses 1/2, 1/4 and 1/4, the first reaches 0.5 by itself; more takes both equals."""
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[3, 1, 2]] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert kept(logits, make_sequence(top_p=0.5, top_k=50)) == {3}
    assert kept(logits, make_sequence(top_p=0.75, top_k=50)) == {1, 3}
    assert kept(logits, make_sequence(top_p=0.5)) == {3}
    assert kept(logits, make_sequence(top_p=0.6)) == {1, 2, 3}


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_the_smallest_vocabularies_can_be_sampled(vocab: int) -> None:
    sequences = [
        make_sequence(prompt=(0,), stop_ids=(), own_seed=i, top_k=i % 4, top_p=(0.5, 1.0)[i % 2])
        for i in range(16)
    ]
    logits = rows(16, vocab=vocab)
    expected = [expected_token(row, s) for row, s in zip(logits, sequences, strict=True)]
    assert sample(logits, sequences).token_ids.tolist() == expected
