"""Temperature, top_k, top_p, min_p and the draw, without a sort.

    p = softmax(logits / temperature), filtered;   token = argmax p / E,   E ~ Exp(1)

The draw is an exponential race, which picks token i with its probability (the Gumbel-max trick in
other terms); E is a hash of seed, position and token id. The kernel draws the same tokens as the
engine's sampler in torch, by the same arithmetic: shares of the probability mass are sums of the
integers 2^40 · exp, and comparisons are exact. No result depends on the order of a reduction, so
the passes over a row can be laid out for speed:

    histogram     count (maximum − logit) / temperature in 2048 bins; the bins after top_k tokens,
                  or after all of top_p's mass, are dropped
    candidates    list the token ids of the other bins, in ascending order (about k, or a few
                  thousand)
    top_k, top_p  find the smallest logit that is kept, to the bit, by a 16-way search over the
                  candidates
    race          draw from what is left

One program per row. If there are more than CAPACITY candidates (a flat distribution), the last two
passes read the whole row. Without top_k and top_p only the race is left: each program then takes
PIECE tokens of a row, and a second launch takes the best of a row's pieces.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ...checks import (
    FLOAT_DTYPES,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .sampling_passes import (
    LAST_ID,
    cut_to_mass,
    cut_to_top_k,
    first_of_best,
    histogram,
    kept_mass,
    last_bin,
    list_candidates,
    race,
    stream_key,
)

MAX_EXACT_TOP_K = 1024
"""Up to this top_k exactly k tokens are kept, lower ids first among equal logits; above it all
tokens that equal the k-th are kept."""
CAPACITY = 16384
"""Maximum length of a row's list of candidates."""
BLOCK = 4096
"""Tokens per iteration of the passes over a whole row."""
SEARCH_BLOCK = 512
"""Tokens per iteration of the searches, which hold 16 sums per token."""
NUM_WARPS = 16
PIECE, PIECE_BLOCK = 4096, 1024
"""Tokens per program of the unfiltered race, and per iteration of it."""


@triton.jit
def _load_best(best_ptr, row):
    """Load a row's maximum as float32, with −0 as +0 and NaN (such a row has no winner) as 0."""
    best = tl.load(best_ptr + row).to(tl.float32) + 0.0
    return tl.where(best == best, best, 0.0)


@triton.jit
def _no_cut():
    """Return the cut that keeps every token: the lowest int32, which no float has as its key."""
    return (
        tl.full([], -LAST_ID - 1, dtype=tl.int32),
        tl.full([], LAST_ID, dtype=tl.int32),
        tl.full([], float("-inf"), dtype=tl.float32),
        tl.full([], 0, dtype=tl.int1),
    )


@triton.jit(do_not_specialize=["has_min_p"])
def _race_pieces_kernel(
    values_ptr,
    winners_ptr,
    logits_ptr,
    best_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    log_min_p_ptr,
    logits_stride,
    has_min_p,
    VOCAB: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    piece = tl.program_id(1)
    source = tl.load(rows_ptr + index)
    logits_ptr += source * logits_stride
    log_min_p = tl.load(log_min_p_ptr + index, mask=has_min_p > 0, other=float("-inf"))
    best = _load_best(best_ptr, source)
    count = tl.full([], VOCAB, dtype=tl.int32)
    unlisted = tl.full([], 0, dtype=tl.int32)
    # There is no list of candidates; `winners_ptr` fills its place and is not read.
    row = (logits_ptr, winners_ptr, unlisted, count, best, tl.load(temperature_ptr + index))
    stream = stream_key(tl.load(seeds_ptr + index), tl.load(positions_ptr + index))
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, VOCAB)
    value, winner = race(row, _no_cut(), log_min_p, stream, begin, end, BLOCK)
    place = index * tl.num_programs(1) + piece
    tl.store(values_ptr + place, value)
    tl.store(winners_ptr + place, winner)


@triton.jit
def _best_piece_kernel(out_ptr, values_ptr, winners_ptr, PIECES: tl.constexpr, PAD: tl.constexpr):
    # A piece without a winner has the value −1, the padding −2: id 0 if no piece has one.
    index = tl.program_id(0)
    piece = tl.arange(0, PAD)
    place = index * PIECES + piece
    values = tl.load(values_ptr + place, mask=piece < PIECES, other=-2.0)
    winners = tl.load(winners_ptr + place, mask=piece < PIECES, other=0)
    _, winner = first_of_best(values, winners)
    tl.store(out_ptr + index, winner.to(tl.int64))


# Over 50 lines: 20 parameters, and passes that share the row's state.
@triton.jit(do_not_specialize=["has_top_k", "has_top_p", "has_min_p"])
def _sample_tokens_kernel(
    out_ptr,
    logits_ptr,
    best_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    candidates_ptr,
    logits_stride,
    has_top_k,
    has_top_p,
    has_min_p,
    VOCAB: tl.constexpr,
    MAX_EXACT_TOP_K: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
):
    # 1. Load the row's parameters. A filter that is absent or off gets a value that keeps all.
    index = tl.program_id(0)
    source = tl.load(rows_ptr + index)
    logits_ptr += source * logits_stride
    list_ptr = candidates_ptr + index.to(tl.int64) * CAPACITY
    temperature = tl.load(temperature_ptr + index)
    top_k = tl.load(top_k_ptr + index, mask=has_top_k > 0, other=VOCAB)
    top_p = tl.load(top_p_ptr + index, mask=has_top_p > 0, other=2.0)
    log_min_p = tl.load(log_min_p_ptr + index, mask=has_min_p > 0, other=float("-inf"))
    filters_k = top_k < VOCAB
    exact = filters_k & (top_k <= MAX_EXACT_TOP_K)

    best = _load_best(best_ptr, source)
    listed = tl.full([], 0, dtype=tl.int32)
    count = tl.full([], VOCAB, dtype=tl.int32)
    key, last_id, relative, _ = _no_cut()
    cut = (key, last_id, relative, exact)
    if filters_k | (top_p < 1.0):
        # 2. Two passes over the row narrow it down to the candidates, and sum the row's mass.
        counts = histogram(logits_ptr, best, temperature, VOCAB, BLOCK)
        last = last_bin(counts, top_k, (1.0 - top_p).to(tl.float32), filters_k)
        size, mass = list_candidates(
            logits_ptr, list_ptr, best, temperature, last, VOCAB, CAPACITY, BLOCK
        )
        listed = (size <= CAPACITY).to(tl.int32)
        count = tl.where(listed > 0, size, VOCAB)
        row = (logits_ptr, list_ptr, listed, count, best, temperature)
        # 3. top_k first: top_p then is a share of the mass that top_k leaves.
        if filters_k:
            cut = cut_to_top_k(row, cut, top_k, SEARCH_BLOCK)
            if top_p < 1.0:
                mass = kept_mass(row, cut, SEARCH_BLOCK)
        # 4. top_p keeps the likeliest tokens that together reach the target, at least one.
        if top_p < 1.0:
            target = tl.maximum(tl.ceil(mass.to(tl.float64) * top_p).to(tl.int64), 1)
            cut = cut_to_mass(row, cut, target, SEARCH_BLOCK)
    # 5. Draw from what is left: the candidates, or the whole row if nothing filters it.
    row = (logits_ptr, list_ptr, listed, count, best, temperature)
    stream = stream_key(tl.load(seeds_ptr + index), tl.load(positions_ptr + index))
    _, winner = race(row, cut, log_min_p, stream, 0, count, BLOCK)
    tl.store(out_ptr + index, winner.to(tl.int64))


def sample_tokens(
    logits: torch.Tensor,
    best: torch.Tensor,
    *,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    log_min_p: torch.Tensor | None = None,
) -> torch.Tensor:  # over 50 lines by its docstring and its twelve arguments, passed on twice
    """Draw a token id `[G]` int64 from each of the G `rows` of `logits`.

    logits is `[R, V]` of any float dtype, `best` `[R]` holds its rows' maxima. All others are `[G]`
    or `[G, 1]`. rows (int64) are indices into logits; seeds and positions (int64) name the stream
    of random numbers of each draw; logits are divided by temperature (float32, positive). top_k
    (int64; V or more is off) and then top_p (float64; 1 or more is off) filter, and finally tokens
    below max + log_min_p (float32, in tempered logits; -inf is off) are dropped.

    If top_k is at most MAX_EXACT_TOP_K, top_k and top_p take equal logits by ascending id;
    otherwise equal logits are kept or dropped together. A row without a finite logit, or with +inf
    or NaN, gives an arbitrary id of the vocabulary. Raises ValueError on shapes, dtypes, devices or
    layouts that do not fit.
    """
    columns: dict[str, tuple[torch.Tensor | None, torch.dtype]] = {
        "rows": (rows, torch.int64),
        "seeds": (seeds, torch.int64),
        "positions": (positions, torch.int64),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int64),
        "top_p": (top_p, torch.float64),
        "log_min_p": (log_min_p, torch.float32),
    }
    count = rows.numel()
    _check(logits, best, columns, count)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count == 0:
        return out
    if top_k is None and top_p is None:
        _race_unfiltered(out, logits, best, rows, seeds, positions, temperature, log_min_p)
        return out
    vocab_size = logits.shape[1]
    capacity, width = min(CAPACITY, vocab_size), triton.next_power_of_2(vocab_size)
    # A filter that is left out is not read; another pointer of its dtype saves a compilation.
    _sample_tokens_kernel[(count,)](
        out, logits, best, rows, seeds, positions, temperature,
        seeds if top_k is None else top_k,
        seeds.view(torch.float64) if top_p is None else top_p,
        temperature if log_min_p is None else log_min_p,
        torch.empty(count, capacity, dtype=torch.int32, device=logits.device),
        logits.stride(0), int(top_k is not None), int(top_p is not None),
        int(log_min_p is not None),
        VOCAB=vocab_size, MAX_EXACT_TOP_K=MAX_EXACT_TOP_K, CAPACITY=capacity,
        BLOCK=min(BLOCK, width), SEARCH_BLOCK=min(SEARCH_BLOCK, width), num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _check(
    logits: torch.Tensor,
    best: torch.Tensor,
    columns: dict[str, tuple[torch.Tensor | None, torch.dtype]],
    count: int,
) -> None:
    """Raise ValueError unless logits, maxima and the parameters of `count` draws fit together."""
    require_shape("logits", logits, None, None)
    require_dtype("logits", logits, *FLOAT_DTYPES)
    require_last_contiguous("logits", logits)
    require_dtype("best", best, logits.dtype)
    require_shape("best", best, logits.shape[0])
    require_contiguous("best", best)
    vocab_size = logits.shape[1]
    require(0 < vocab_size < 2**30, f"vocabulary size must be 1 to 2**30 - 1, not {vocab_size}")
    for name, (column, dtype) in columns.items():
        if column is not None:
            require_dtype(name, column, dtype)
            require(column.numel() == count, f"{name} has {column.numel()} values, not {count}")
            require_contiguous(name, column)
    tensors = {name: column for name, (column, _) in columns.items()}
    require_launchable(logits=logits, best=best, **tensors)


def _race_unfiltered(
    out: torch.Tensor,
    logits: torch.Tensor,
    best: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    log_min_p: torch.Tensor | None,
) -> None:
    """Draw without top_k and top_p: a race in each piece of a row, then the best of its pieces."""
    count, vocab_size = len(out), logits.shape[1]
    pieces = triton.cdiv(vocab_size, PIECE)
    values = torch.empty(count, pieces, dtype=torch.float32, device=logits.device)
    winners = torch.empty(count, pieces, dtype=torch.int32, device=logits.device)
    _race_pieces_kernel[(count, pieces)](
        values, winners, logits, best, rows, seeds, positions, temperature,
        temperature if log_min_p is None else log_min_p, logits.stride(0),
        int(log_min_p is not None),
        VOCAB=vocab_size, PIECE=PIECE, BLOCK=min(PIECE_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=4,
        maxnreg=80,  # without it, ptxas targets 64 and spills
    )  # fmt: skip
    pad = triton.next_power_of_2(pieces)
    _best_piece_kernel[(count,)](out, values, winners, PIECES=pieces, PAD=pad, num_warps=1)
