"""Test that rows depend on no other row and no earlier batch, and that nothing waits for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.engine.devices.cpu.draws import CpuDraws
from quire.engine.sampling.draws import DrawOps
from quire.engine.sampling.sampler import Sampler, collect_logprobs

from ..sampling_rows import (
    CPU,
    PARAMETERS,
    VOCAB,
    expected_token,
    make_sampler,
    make_sequence,
    rows,
    sample,
)


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
