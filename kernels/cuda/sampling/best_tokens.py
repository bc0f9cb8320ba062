"""The likeliest token of each row of logits, and whether the row is finite.

    grid (row, PIECE tokens)   the maximum of a piece, and the first id that has it
    grid (row)                 the best of the row's pieces

A captured decode step ends with these two launches, so that the host needs neither logits nor any
launch for a greedy token. A row is spread over many programs, since there may be only one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ...checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)

PIECE = 4096
"""Tokens per program."""
_NO_ID = tl.constexpr(2**30)


@triton.jit
def _best_of_pieces_kernel(
    values_ptr, ids_ptr, logits_ptr, logits_stride, VOCAB: tl.constexpr, PIECE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    logits_ptr += row * logits_stride
    x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # NaN: the row is not finite
    best = tl.max(x, 0)
    place = row * tl.num_programs(1) + piece
    tl.store(values_ptr + place, best)
    tl.store(ids_ptr + place, tl.min(tl.where(x == best, token, _NO_ID), 0))


@triton.jit
def _best_of_rows_kernel(
    best_ptr,
    out_ptr,
    finite_ptr,
    values_ptr,
    ids_ptr,
    PIECES: tl.constexpr,
    PAD: tl.constexpr,
):
    row = tl.program_id(0)
    piece = tl.arange(0, PAD)
    place = row * PIECES + piece
    values = tl.load(values_ptr + place, mask=piece < PIECES, other=float("-inf"))
    ids = tl.load(ids_ptr + place, mask=piece < PIECES, other=_NO_ID)
    best = tl.max(values, 0)
    tl.store(best_ptr + row, best.to(best_ptr.dtype.element_ty))
    tl.store(out_ptr + row, tl.min(tl.where(values == best, ids, _NO_ID), 0).to(tl.int64))
    tl.store(finite_ptr + row, (tl.abs(best) != float("inf")).to(tl.uint8))


@once_a_signature
def _check(
    logits: torch.Tensor, best: torch.Tensor, token_ids: torch.Tensor, finite: torch.Tensor
) -> None:
    require_shape("logits", logits, None, None)
    require_dtype("logits", logits, *FLOAT_DTYPES)
    require_last_contiguous("logits", logits)
    num_rows, vocab_size = logits.shape
    require(0 < vocab_size < 2**30, f"vocabulary size must be 1 to 2**30 - 1, not {vocab_size}")
    for name, tensor, dtype in (
        ("best", best, logits.dtype),
        ("token_ids", token_ids, torch.int64),
        ("finite", finite, torch.bool),
    ):
        require_shape(name, tensor, num_rows)
        require_dtype(name, tensor, dtype)
        require_contiguous(name, tensor)
    require_launchable(logits=logits, best=best, token_ids=token_ids, finite=finite)


def best_tokens(
    logits: torch.Tensor, best: torch.Tensor, token_ids: torch.Tensor, finite: torch.Tensor
) -> None:
    """Write the maxima `best` `[R]` of logits `[R, V]`, in their dtype, and the first `token_ids`
    `[R]` int64 that have them.

    `finite` `[R]` bool is False for a row with NaN or +inf, whose maximum is +inf then, and for one
    of nothing but -inf. Raises ValueError on shapes, dtypes, devices or layouts that do not fit.
    """
    _check(logits, best, token_ids, finite)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    pieces = triton.cdiv(vocab_size, PIECE)
    values = torch.empty(num_rows, pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, pieces, dtype=torch.int32, device=logits.device)
    _best_of_pieces_kernel[(num_rows, pieces)](
        values, ids, logits, logits.stride(0), VOCAB=vocab_size,
        PIECE=min(PIECE, triton.next_power_of_2(vocab_size)), num_warps=4,
    )  # fmt: skip
    _best_of_rows_kernel[(num_rows,)](
        best, token_ids, finite.view(torch.uint8), values, ids, PIECES=pieces,
        PAD=triton.next_power_of_2(pieces), num_warps=1,
    )  # fmt: skip
