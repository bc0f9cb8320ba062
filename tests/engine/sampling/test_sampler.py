"""Compare each parameter with transformers' processors or its formula, and rows with each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from quire.engine.devices.cpu.draws import CpuDraws
from quire.engine.errors import InvalidRequestError
from quire.engine.sampling.draws import DrawOps
from quire.engine.sampling.sampler import Sampler, collect_logprobs
from quire.engine.step import SequenceSpec

from ..sampling_rows import (
    CPU,
    EOS,
    expected_token,
    make_sampler,
    make_sequence,
    sample,
    softmax_after_filters,
)

VOCAB = 97

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1e-8},
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_k": 10**9},
    {"top_p": 0.1},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    {"top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0, "temperature": 0.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.7, "temperature": 0.0},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_k": 9},
    {"logit_bias": ((5, 3.0), (6, -100.0), (7, 1.5))},
    {"logit_bias": ((11, 100.0),)},
    {"allowed_token_ids": (4, 8, 15, 16, 23, 42)},
    {"allowed_token_ids": (4, 8, 15), "top_k": 10},
    {"allowed_token_ids": (4,), "top_p": 0.5},
    {"min_tokens": 10, "temperature": 0.0},
    {"min_tokens": 10, "top_p": 0.9},
    {"bad_words": ((EOS,), (5, 7, EOS - 1)), "temperature": 0.0},
    {"bad_words": ((EOS,), (7, 40), (5, 7, 41), (9, 5, 7, 42), (7, 7, 30, 5, 7, 43)), "top_k": 9},
    {"bad_words": tuple((7, token) for token in range(90)), "min_tokens": 6},
]


def rows(count: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


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


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_other_rows(dtype: torch.dtype, vocab: int) -> None:
    params = [
        *PARAMETERS,
        {"top_k": 2000, "top_p": 0.95},
        {"top_k": 1024, "logprobs": 3},
        {"temperature": 0.0, "logprobs": 0},
        {"logprobs": 8, "repetition_penalty": 1.1},
    ]
    generator = torch.Generator().manual_seed(3)
    for start in range(0, len(params), 2):
        company = [params[(start + i) % len(params)] for i in range(16)]
        logits = rows(16, start, vocab).to(dtype)
        sequences = [
            make_sequence(
                prompt=torch.randint(vocab, (5 + i,), generator=generator).tolist(),
                output=torch.randint(vocab, (i,), generator=generator).tolist(),
                own_seed=100 + i,
                **p,
            )
            for i, p in enumerate(company)
        ]
        sampler = make_sampler(vocab)
        batch = sampler.prepare(sequences)
        together = sampler(logits, batch)
        logprobs = collect_logprobs(together, batch)
        for row in range(16):
            alone_batch = sampler.prepare(sequences[row : row + 1])
            alone = sampler(logits[row : row + 1], alone_batch)
            assert int(alone.token_ids) == int(together.token_ids[row])
            assert collect_logprobs(alone, alone_batch).get(0) == logprobs.get(row)  # bitwise


def test_logits_are_not_modified() -> None:
    logits = rows(len(PARAMETERS))
    before = logits.clone()
    sample(logits, [make_sequence(**params) for params in PARAMETERS])
    assert logits.equal(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_is_flagged_and_affects_no_other(bad: float) -> None:
    sequences = [
        make_sequence(own_seed=i, logprobs=2, **p) for i, p in enumerate(PARAMETERS) for _ in "ab"
    ]
    good = rows(len(sequences))
    logits = good.clone()
    logits[::2, 13] = bad
    logits[4] = bad
    sampler = make_sampler(VOCAB)
    batch = sampler.prepare(sequences)
    output, reference = sampler(logits, batch), sampler(good, batch)
    assert output.finite.tolist() == [False, True] * len(PARAMETERS)
    assert output.token_ids[1::2].equal(reference.token_ids[1::2])
    assert ((output.token_ids >= 0) & (output.token_ids < VOCAB)).all()
    healthy = collect_logprobs(output, batch)
    expected = collect_logprobs(reference, batch)
    assert healthy == {row: expected[row] for row in range(1, len(sequences), 2)}


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


def test_penalties_follow_a_sequence_through_changes_of_the_batch() -> None:
    """Rows join and leave, histories grow and one is preempted: a new sampler gives the same."""
    sampler = make_sampler(VOCAB)
    generator = torch.Generator().manual_seed(1)
    sequences = [
        make_sequence(
            prompt=torch.randint(VOCAB, (length,), generator=generator).tolist(),
            own_seed=i,
            max_tokens=1000,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.2 * (i % 3),
        )
        for i, length in enumerate((3, 250, 9, 600, 1, 30, 31, 32, 33, 34))
    ]
    for step in range(40):
        running = [s for i, s in enumerate(sequences) if (step + i) % 5 and (i < 4 or step > 10)]
        if step == 20:
            sampler.forget([s.seq_id for s in sequences[::2]])
        logits = rows(len(running), step)
        tokens = sampler(logits, sampler.prepare(running)).token_ids.tolist()
        for row, (sequence, token_id) in enumerate(zip(running, tokens, strict=True)):
            assert token_id == expected_token(logits[row], sequence)
            sequence.token_ids.append(token_id)


def test_positions_may_run_ahead_of_the_tokens() -> None:
    logits = rows(1)
    sequence = make_sequence(own_seed=5)
    sampler = make_sampler(VOCAB)
    ahead = sampler(logits, sampler.prepare([sequence], [4])).token_ids
    sequence.token_ids.append(50)
    assert ahead.equal(sampler(logits, sampler.prepare([sequence])).token_ids)


def test_forget_drops_all_state() -> None:
    sampler = make_sampler(VOCAB)
    sequences = [make_sequence(allowed_token_ids=(3, 4), presence_penalty=1.0) for _ in range(30)]
    logits = rows(len(sequences))
    before = sampler(logits, sampler.prepare(sequences)).token_ids
    sampler.forget([s.seq_id for s in sequences] + [10**9])
    builder = sampler._builder
    assert not builder._maker._plain and not builder._maker._forbidden
    assert len(builder.history) == 0 and not builder._sequences
    assert before.equal(sampler(logits, sampler.prepare(sequences)).token_ids)


def test_bitmask_constrains_only_its_rows() -> None:
    vocab = 70  # not a multiple of 32
    logits = rows(4, vocab=vocab)
    allowed = [[0, 31, 32, 69], [63], list(range(vocab)), [1]]
    words = torch.zeros(4, 3, dtype=torch.int64)
    for row, tokens in enumerate(allowed):
        for token_id in tokens:
            words[row, token_id // 32] |= 1 << (token_id % 32)
    bitmask = (words - ((words >> 31) << 32)).to(torch.int32)  # the words' bits, as llguidance's
    sequences = [make_sequence(own_seed=i, temperature=0.0 if i == 0 else 1.0) for i in range(4)]
    sampler = make_sampler(vocab)
    batch = sampler.prepare(sequences, constrained_rows=[0, 1, 2])
    tokens = sampler(logits, batch, bitmask[:3]).token_ids
    free = sampler(logits, sampler.prepare(sequences)).token_ids
    assert int(tokens[0]) == max(allowed[0], key=lambda token_id: float(logits[0, token_id]))
    assert int(tokens[1]) == 63
    assert tokens[2:].equal(free[2:])
    with pytest.raises(ValueError, match="bitmask"):
        sampler(logits, batch)


def test_logits_of_another_shape_are_refused() -> None:
    sampler = make_sampler(VOCAB)
    with pytest.raises(ValueError, match="logits"):
        sampler(rows(2), sampler.prepare([make_sequence()]))


class NoWaiting(TorchDispatchMode):
    """A mode that fails on operations for which the host must wait on a GPU.

    These are the ones whose result's shape or value the host needs.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2"}, name
        if name in {"index", "index_put", "index_put_"}:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("draws", [None, CpuDraws(5000)])
def test_nothing_waits_for_the_device(draws: DrawOps | None) -> None:
    params = [*PARAMETERS, {"top_k": 3000, "top_p": 0.9}, {"logprobs": 5}]
    logits = rows(len(params), vocab=5000)
    sampler = Sampler(5000, CPU, draws)
    sequences = [make_sequence(output=(4, 4), **p) for p in params]
    bitmask = torch.full((len(params), 157), -1, dtype=torch.int32)
    with NoWaiting():
        for _ in range(2):
            batch = sampler.prepare(sequences, constrained_rows=range(len(params)))
            sampler(logits, batch, bitmask)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        logits[0, 0].item()


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
