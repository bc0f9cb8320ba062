"""Compare the likeliest tokens with torch's, and the flags of rows that are not finite."""

import pytest
import torch

from quire.kernels import reference
from quire.kernels.cuda.sampling.best_tokens import PIECE, best_tokens


def find(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the kernel writes, and check that the reference writes the same."""
    outputs = []
    for function in (best_tokens, reference.best_tokens):
        best = torch.full((len(logits),), 9.0, dtype=logits.dtype)
        ids, finite = torch.full((len(logits),), -7), torch.zeros(len(logits), dtype=torch.bool)
        function(logits, best, ids, finite)
        outputs.append((best, ids, finite))
    for found, wanted in zip(*outputs, strict=True):
        assert torch.equal(found, wanted)
    return outputs[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 2, 1000, PIECE, 2 * PIECE + 5])
def test_random_rows(vocab_size: int, dtype: torch.dtype) -> None:
    """Half precision has many equal logits: the first of them wins."""
    generator = torch.Generator().manual_seed(vocab_size)
    wide = torch.randn(3, vocab_size + 11, generator=generator).to(dtype)
    best, ids, finite = find(wide[:, :vocab_size])
    values, expected = wide[:, :vocab_size].max(dim=1)
    assert torch.equal(best, values) and torch.equal(ids, expected) and finite.all()


def test_equal_logits_in_several_pieces() -> None:
    logits = torch.zeros(2, 3 * PIECE)
    logits[0, PIECE + 3] = logits[0, 2 * PIECE] = 1.0
    logits[1, :PIECE] = -1.0
    assert find(logits)[1].tolist() == [PIECE + 3, PIECE]


def test_rows_that_are_not_finite() -> None:
    """Their ids are in the vocabulary all the same."""
    logits = torch.zeros(5, PIECE + 20)
    logits[0, PIECE + 7] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, 5:] = float("-inf")
    logits[4, 9], logits[4, 11] = float("nan"), float("inf")
    best, ids, finite = find(logits)
    assert finite.tolist() == [False, False, False, True, False]
    assert ids.tolist() == [PIECE + 7, 3, 0, 0, 9]
    assert best.tolist() == [float("inf")] * 2 + [float("-inf"), 0.0, float("inf")]


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits = torch.zeros(2, 8)
    best, ids, finite = torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2).bool()
    for arguments in (
        (logits[0], best, ids, finite), (logits, best.half(), ids, finite),
        (logits, best, ids.int(), finite), (logits, best, ids, finite[:1]),
        (logits.T, best, ids, finite),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="logits|best|token_ids|finite"):
            best_tokens(*arguments)
