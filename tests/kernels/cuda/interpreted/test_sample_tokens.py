"""Compare the kernel's draws with those of the engine's sampler in torch, row by row.

The interpreter's exp and log1p sometimes differ from torch's in the last place, which changes a
row's token with a probability of about 1e-6. On GPUs both call the same functions;
benchmarks/gpu.py compares them there.
"""

import math
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from quire.engine.devices.cuda.draws import CudaDraws
from quire.engine.request import Request
from quire.engine.sampling import plan as sampling_plan
from quire.engine.sampling.sampler import Sampler
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Rank, Sequence
from quire.engine.step import SequenceSpec
from quire.kernels.cuda.sampling import sample_tokens as module
from quire.kernels.cuda.sampling import sampling_passes
from quire.kernels.cuda.sampling.sample_tokens import sample_tokens

CPU = torch.device("cpu")
VOCAB = 450


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each pass over a row take at least two blocks, the last one not full."""
    monkeypatch.setattr(module, "BLOCK", 256)
    monkeypatch.setattr(module, "PIECE", 256)
    monkeypatch.setattr(module, "PIECE_BLOCK", 128)
    monkeypatch.setattr(module, "SEARCH_BLOCK", 512)
    monkeypatch.setattr(module, "MAX_EXACT_TOP_K", 64)
    monkeypatch.setattr(sampling_plan, "MAX_CANDIDATES", 64)


@triton.jit
def constant(key: Any, ids: Any) -> Any:
    """Return 1 as the exponential of every token."""
    return ids.to(tl.float32) * 0.0 + 1.0


def sequence(seed: int, **params: Any) -> SequenceSpec:
    request = Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        sampling_params=SamplingParams(max_tokens=64, **params),
        arrival_time=0.0,
    )
    return Sequence(request, 0, seed, Rank(0, 0, 0), frozenset()).spec()


def check(logits: torch.Tensor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Draw as the engine does in torch, then with the kernel; compare and return the ids by row."""
    rng = random.Random(len(rows))
    sequences = [sequence(rng.randrange(-(2**63), 2**63), **params) for params in rows]
    positions = [rng.randrange(3, 5000) for _ in rows]
    plain, with_kernel = (Sampler(logits.shape[1], CPU, draws) for draws in (None, CudaDraws()))
    batch = plain.prepare(sequences, positions)
    expected, found = plain(logits, batch), with_kernel(logits, batch)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    return found.token_ids


FILTERS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.05},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 64, "top_p": 0.5},
    {"top_k": 40, "min_p": 0.1},
    {"top_k": 400},
    {"top_k": 65, "top_p": 0.8, "min_p": 0.001},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"top_k": 3, "top_p": 0.999999},
]


def test_the_limit_of_exact_ties_equals_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert module.MAX_EXACT_TOP_K == sampling_plan.MAX_CANDIDATES


def test_shaped_logits_and_greedy_rows() -> None:
    """A bias moves the working rows, without the greedy row, to a float32 tensor of their own."""
    bias = ((5, 40.0),)
    rows = [{"temperature": 0.0}, {"top_k": 5, "logit_bias": bias}, {"top_p": 0.9}]
    found = check(torch.randn(3, VOCAB).bfloat16(), rows)
    assert found[1] == 5


@pytest.mark.parametrize(
    "dtype,spread,temperature",
    [
        (torch.float32, 0.3, 1.0),
        (torch.float32, 3.0, 0.6),
        (torch.bfloat16, 3.0, 1.7),
        (torch.float16, 2.0, 0.01),
    ],
)
def test_every_filter(dtype: torch.dtype, spread: float, temperature: float) -> None:
    logits = (torch.randn(len(FILTERS), VOCAB) * spread).to(dtype)
    check(logits, [params | {"temperature": temperature} for params in FILTERS])


def test_ties_and_masked_tokens() -> None:
    """Few distinct logits make every cut fall among equals; some are ±0 and -inf."""
    logits = torch.randint(-2, 4, (len(FILTERS), VOCAB)).float()
    logits[:, 1::7] = -math.inf
    logits[:, 3::11] = -0.0
    check(logits, FILTERS)
    logits = torch.full((4, VOCAB), -math.inf)
    logits[:, 77], logits[:, 402] = 1.0, 0.5
    found = check(logits, FILTERS[:4])
    assert set(found.tolist()) <= {77, 402}


def test_the_lowest_id_wins_among_equals_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest id wins among equals in any pieces, even if a piece has no token left."""
    monkeypatch.setattr(sampling_passes, "_exponential", constant)
    logits = torch.zeros(3, 700)
    logits[0, [600, 300]], logits[1, 5], logits[2, 699] = 9.0, 9.0, 9.0
    ids = torch.arange(3)
    best = logits.max(dim=1).values
    column = torch.full((3,), 1.0)
    found = sample_tokens(
        logits, best, rows=ids, seeds=ids, positions=ids, temperature=column,
        log_min_p=-column,
    )  # fmt: skip
    assert found.tolist() == [300, 5, 699]


def test_more_candidates_than_the_list_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 16)
    monkeypatch.setattr(module, "SEARCH_BLOCK", 256)
    filters = [params for params in FILTERS if params.keys() & {"top_k", "top_p"}]
    check(torch.randn(len(filters), VOCAB), filters)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_without_a_winner_stay_in_the_vocabulary() -> None:
    """The sampler fails such rows by their maximum; their neighbours are not affected."""
    logits = torch.randn(4, VOCAB)
    logits[0], logits[1, 5], logits[2, 9] = -math.inf, math.inf, math.nan
    options: dict[str, Any] = {
        "rows": torch.arange(4),
        "seeds": torch.arange(4),
        "positions": torch.arange(4),
        "temperature": torch.ones(4),
    }
    for top_p in (None, torch.full((4, 1), 0.9, dtype=torch.float64)):
        best = logits.max(dim=1).values
        found = sample_tokens(logits, best, **options, top_p=top_p)
        alone = sample_tokens(
            logits, best, **{name: column[3:] for name, column in options.items()},
            top_p=None if top_p is None else top_p[3:],
        )  # fmt: skip
        assert ((found >= 0) & (found < VOCAB)).all() and found[3] == alone[0]


def test_refusals() -> None:
    logits, best, ids = torch.zeros(2, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    good: dict[str, Any] = {
        "rows": ids, "seeds": ids, "positions": ids, "temperature": torch.ones(2),
    }  # fmt: skip
    for change in (
        {"seeds": ids.int()},
        {"positions": ids[:1]},
        {"temperature": torch.ones(2).double()},
        {"top_p": torch.ones(2)},
        {"top_k": ids.int()},
        {"rows": ids[:1]},
    ):
        with pytest.raises(ValueError):
            sample_tokens(logits, best, **good | change)
    for wrong in ((logits.T, best), (logits, best[:1]), (logits, best.half())):
        with pytest.raises(ValueError):
            sample_tokens(*wrong, **good)
    assert sample_tokens(logits, best, **{name: x[:0] for name, x in good.items()}).shape == (0,)
