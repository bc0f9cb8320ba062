"""Compare log-probabilities with float64; the greedy choice must be exact. Test their host form."""

from __future__ import annotations

import pytest
import torch

from quire.engine.sampling import logprobs as module
from quire.engine.sampling.logprobs import compute_logprobs, to_token_logprobs
from quire.engine.sampling.sampler import collect_logprobs

from ..sampling_rows import make_sampler, make_sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 5, 64, 100])
def test_against_float64(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 64, generator=generator) * 4).to(dtype)
    token_ids = torch.randint(64, (9,), generator=generator)
    result = compute_logprobs(logits, token_ids, k)
    exact = logits.double().log_softmax(dim=1)
    assert result.logprobs.dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result.logprobs.double(), exact[range(9), token_ids], **tolerance)
    for row in range(9):
        order = sorted(range(64), key=lambda t, row=row: (-float(logits[row, t]), t))
        assert result.top_token_ids[row].tolist() == order[:k]
        better = int((logits[row] > logits[row, token_ids[row]]).sum())
        assert int(result.ranks[row]) == better + 1
    width = min(k, 64)
    assert result.top_logprobs.shape == result.top_token_ids.shape == (9, width)
    best = exact.gather(1, result.top_token_ids)
    torch.testing.assert_close(result.top_logprobs.double(), best, **tolerance)


def test_computing_in_pieces_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    token_ids = torch.arange(11)
    whole = compute_logprobs(logits, token_ids, 3)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    pieces = compute_logprobs(logits, token_ids, 3)
    assert all(a.equal(b) for a, b in zip(whole, pieces, strict=True))
    assert compute_logprobs(logits[:0], token_ids[:0], 3).top_logprobs.shape == (0, 3)


def test_named_tokens_are_those_of_the_log_softmax_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    sampler = make_sampler(50)
    named: list[tuple[int, ...]] = [(3, 49, 3), (), tuple(range(50)), (7,)]
    sequences = [
        make_sequence(),
        *(make_sequence(logprobs=k, logprob_token_ids=named[k]) for k in range(4)),
        make_sequence(temperature=0.0),
    ]
    batch = sampler.prepare(sequences)
    exact = torch.log_softmax(logits, dim=-1)
    for elements in (1 << 25, 100):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        entries = collect_logprobs(sampler(logits, batch), batch)
        assert sorted(entries) == [1, 2, 3, 4]
        for row, ids in enumerate(named, start=1):
            got = entries[row].named_logprobs
            assert got == ([exact[row, token_id].item() for token_id in ids] or None)
    # A batch without such rows carries none.
    batch = sampler.prepare(sequences[:1] + sequences[2:3])
    output = sampler(logits[:2], batch)
    assert output.logprobs is not None and output.logprobs.named_logprobs.shape == (1, 0)


def test_rows_keep_their_own_number_of_alternatives() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    tensors = compute_logprobs(logits, torch.tensor([0, 0]), 2)
    first, second = to_token_logprobs(tensors, [0, 2])
    assert (first.token_id, first.rank, first.top_token_ids, first.top_logprobs) == (0, 3, [], [])
    assert (second.rank, second.top_token_ids) == (1, [0, 2])
    assert second.logprob == second.top_logprobs[0]


def test_sampled_rows_report_the_models_own_distribution() -> None:
    """They are taken before temperature, bias and penalties, and only for rows that asked.

    The token of a greedy row is its likeliest one.
    """
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    logits[0, 4] = logits[0, 20] = 9.0
    sampler = make_sampler(30)
    sequences = [
        make_sequence(temperature=0.0, logprobs=3),
        make_sequence(),
        make_sequence(temperature=0.0, logprobs=1, logit_bias=((7, 100.0),)),
        make_sequence(temperature=2.0, logprobs=0, repetition_penalty=2.0),
    ]
    batch = sampler.prepare(sequences)
    output = sampler(logits, batch)
    entries = collect_logprobs(output, batch)
    exact = logits.double().log_softmax(dim=1)
    assert sorted(entries) == [0, 2, 3]
    assert entries[0].logprob == entries[0].top_logprobs[0]
    assert (entries[0].token_id, entries[0].rank) == (4, 1)
    assert entries[0].top_token_ids[:2] == [4, 20]
    assert entries[2].token_id == 7
    assert [len(entries[row].top_logprobs) for row in (0, 2, 3)] == [3, 1, 0]
    for row, entry in entries.items():
        assert entry.token_id == int(output.token_ids[row])
        assert entry.logprob == pytest.approx(float(exact[row, entry.token_id]), rel=1e-5)
    assert collect_logprobs(sampler(logits[:1], b := sampler.prepare(sequences[1:2])), b) == {}
