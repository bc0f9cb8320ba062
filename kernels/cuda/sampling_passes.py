"""The passes of sample_tokens.py over one row of logits, and the arithmetic that they share.

A row is handed on as (logits, list, listed, count, best, temperature): `count` tokens, whose ids
are those of the list of candidates where `listed`, else 0, 1, 2, …; `best` is the row's maximum.
What is left of it is a cut (key, id, relative, exact): up to this (logit, id) where `exact`, else
all whose tempered logit is at least `relative`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..checks import interpreting

NUM_BINS = tl.constexpr(2048)
LINEAR_BINS = tl.constexpr(1024)  # 64 a unit, up to 16; then 128 an octave
LAST_ID = tl.constexpr(0x7FFFFFFF)
_INTERPRETED = tl.constexpr(interpreting())
_WAYS = tl.constexpr(16)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_INT63_MAX = tl.constexpr(2**63 - 1)
_NEGATIVE_UNIT = tl.constexpr(-(1.0 - 2.0**-24) * 2.0**-63)
_MASS_UNIT = tl.constexpr(2.0**40)


@triton.jit
def _exp(x):
    """As torch has it on CUDA; the interpreter knows no libdevice."""
    if _INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return libdevice.exp(x)


@triton.jit
def _log1p(x):
    if _INTERPRETED:  # Kahan's: the rounding of 1 + x cancels
        wide = x.to(tl.float64)
        one_more = 1.0 + wide
        exact = one_more == 1.0
        ratio = tl.log(one_more) / tl.where(exact, 1.0, one_more - 1.0)
        return tl.where(exact, wide, wide * ratio).to(tl.float32)
    else:
        return libdevice.log1p(x)


@triton.jit
def _mix(state):
    """SplitMix64's finaliser, on uint64."""
    state = (state ^ (state >> 30)) * _MULTIPLIER_1
    state = (state ^ (state >> 27)) * _MULTIPLIER_2
    return state ^ (state >> 31)


@triton.jit
def stream_key(seed, position):
    """The key of a row's random numbers, from two int64. Bit for bit that of the engine's
    counter_rng."""
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    return _mix(_mix(seed + _GAMMA) + (position + 1) * _GAMMA)


@triton.jit
def _exponential(key, ids):
    """E ~ Exp(1) of each token id in the stream `key`. Bit for bit that of the engine's
    counter_rng."""
    bits = _mix((ids.to(tl.uint64) + 1) * _GAMMA + key) & _INT63_MAX
    negative_u = (bits.to(tl.int64).to(tl.float32) + 0.5) * _NEGATIVE_UNIT
    return -_log1p(negative_u)


@triton.jit
def order_key(x):
    """int32 that order as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def relative_of(x, best, temperature):
    """(x − best) / temperature, rounded as torch does."""
    difference = x - best
    return tl.div_rn(difference, tl.broadcast_to(temperature, difference.shape))


@triton.jit
def mass_of(relative):
    """exp(relative ≤ 0) in units of 2^-40, int64."""
    return (_exp(relative) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _load(logits_ptr, ids, mask):
    """Logits as float32, without a negative zero."""
    return tl.load(logits_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32) + 0.0


@triton.jit
def _bin(x, best, per_unit):
    """Which of the bins; only has to grow as x falls."""
    distance = (best - x) * per_unit
    linear = tl.minimum(distance * 64.0, LINEAR_BINS - 1.0).to(tl.int32)
    bits = tl.maximum(distance, 16.0).to(tl.int32, bitcast=True)
    octaves = tl.minimum((bits >> 16) - (0x41800000 >> 16), NUM_BINS - LINEAR_BINS - 1)
    return tl.where(distance < 16.0, linear, LINEAR_BINS + octaves)


@triton.jit
def histogram(logits_ptr, best, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    counts = tl.zeros([NUM_BINS], dtype=tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        bins = _bin(_load(logits_ptr, ids, ids < VOCAB), best, 1.0 / temperature)
        counts += tl.histogram(bins, NUM_BINS, mask=ids < VOCAB)
    return counts


@triton.jit
def last_bin(counts, top_k, missing, by_count):
    """The last bin that may hold a token that is kept.

    Of top_k tokens by their number; else the tail behind it is at most `missing` of the mass,
    with each bin's tail at its upper and the whole at its lower bound. One bin more, since
    logits that are equal once divided may stand on both sides of an edge.
    """
    index = tl.arange(0, NUM_BINS)
    covered = tl.cumsum(counts, 0)
    by_k = tl.sum((covered < top_k).to(tl.int32), 0)
    octave = (((index - LINEAR_BINS) << 16) + 0x41800000).to(tl.float32, bitcast=True)
    edge = tl.where(index < LINEAR_BINS, index.to(tl.float32) / 64.0, octave)
    upper = counts.to(tl.float32) * tl.exp(-edge)
    lower = tl.sum(tl.where(index < LINEAR_BINS, upper * tl.exp(-1.0 / 64.0), 0.0), 0)
    tail = tl.cumsum(upper, 0, reverse=True) - upper
    by_mass = tl.sum((tail * 1.001 > missing * lower).to(tl.int32), 0)
    return tl.where(by_count, by_k, by_mass) + 1


@triton.jit
def list_candidates(
    logits_ptr, list_ptr, best, temperature, last, VOCAB: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the ids of the tokens up to bin `last`: how many there are (not all may fit), and the
    mass of the whole row."""
    per_unit = 1.0 / temperature
    size = tl.full([], 0, dtype=tl.int32)
    masses = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        mask = ids < VOCAB
        x = _load(logits_ptr, ids, mask)
        masses += tl.where(mask, mass_of(relative_of(x, best, temperature)), 0)
        candidate = (mask & (_bin(x, best, per_unit) <= last)).to(tl.int32)
        place = size + tl.cumsum(candidate, 0) - 1
        tl.store(list_ptr + place, ids, mask=(candidate > 0) & (place < CAPACITY))
        size += tl.sum(candidate, 0)
    tl.debug_barrier()  # other threads of this program read the list
    return size, tl.sum(masses, 0)


@triton.jit
def _tokens(row, start, BLOCK: tl.constexpr):
    """Tokens [start, start + BLOCK) of a row: ids, which there are, logits, tempered logits."""
    logits_ptr, list_ptr, listed, count, best, temperature = row
    place = start + tl.arange(0, BLOCK)
    mask = place < count
    from_list = tl.load(list_ptr + place, mask=mask & (listed > 0), other=0)
    ids = tl.where(listed > 0, from_list, place)
    x = _load(logits_ptr, ids, mask)
    return ids, mask, x, relative_of(x, best, temperature)


@triton.jit
def _kept(x, ids, relative, cut):
    cut_key, cut_id, cut_relative, exact = cut
    key = order_key(x)
    before = (key > cut_key) | ((key == cut_key) & (ids <= cut_id))
    return tl.where(exact, before, relative >= cut_relative)


@triton.jit
def kept_mass(row, cut, BLOCK: tl.constexpr):
    masses = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, row[3], BLOCK):
        ids, mask, x, relative = _tokens(row, start, BLOCK)
        mask &= _kept(x, ids, relative, cut)
        masses += tl.where(mask, mass_of(relative), 0)
    return tl.sum(masses, 0)


@triton.jit
def _covering_key(row, cut, target, low, high, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t in [low, high] such that what is kept and has a key ≥ t weighs `target`
    (by mass, or by number), and the weight of what lies above t. `low` where there is none."""
    way = tl.arange(0, _WAYS).to(tl.int64)
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    above = target * 0
    while low < high:
        step = (high - low) // _WAYS + 1
        limits = tl.minimum(low + way * step, high + 1).to(tl.int32)
        sums = tl.zeros([BLOCK, _WAYS], dtype=tl.int64)
        for start in range(0, row[3], BLOCK):
            ids, mask, x, relative = _tokens(row, start, BLOCK)
            key = order_key(x)
            inside = mask & _kept(x, ids, relative, cut)
            inside &= (key >= low.to(tl.int32)) & (key <= high.to(tl.int32))
            if tl.max(inside.to(tl.int32), 0) > 0:
                weight = tl.full([BLOCK], 1, dtype=tl.int64)
                if MASS:
                    weight = mass_of(relative)
                counted = inside[:, None] & (key[:, None] >= limits[None, :])
                sums += tl.where(counted, weight[:, None], 0)
        totals = tl.sum(sums, 0) + above
        index = tl.maximum(tl.sum((totals >= target).to(tl.int64), 0) - 1, 0)
        following = low + (index + 1) * step
        beyond = tl.sum(tl.where(way == index + 1, totals, 0), 0)
        above = tl.where(following > high, above, beyond)
        low += index * step
        high = tl.minimum(following - 1, high)
    return low.to(tl.int32), above


@triton.jit
def _nth_id(row, key, n, BLOCK: tl.constexpr):
    """The id of the n-th token, from 1, whose key is `key`; LAST_ID where none is."""
    seen = n * 0
    found = tl.full([], LAST_ID, dtype=tl.int32)
    for start in range(0, row[3], BLOCK):
        ids, mask, x, _ = _tokens(row, start, BLOCK)
        equal = mask & (order_key(x) == key)
        rank = seen + tl.cumsum(equal.to(tl.int64), 0)
        found = tl.minimum(found, tl.min(tl.where(equal & (rank == n), ids, LAST_ID), 0))
        seen += tl.sum(equal.to(tl.int64), 0)
    return found


@triton.jit
def cut_to_top_k(row, cut, top_k, BLOCK: tl.constexpr):
    """The cut of the top_k best of an uncut row."""
    best, temperature, exact = row[4], row[5], cut[3]
    lowest = order_key(tl.full([], float("-inf"), dtype=tl.float32))
    key, above = _covering_key(row, cut, top_k, lowest, order_key(best), False, BLOCK)
    last_id = cut[1]
    if exact:
        last_id = _nth_id(row, key, top_k - above, BLOCK)
    return key, last_id, relative_of(_of_key(key), best, temperature), exact


@triton.jit
def cut_to_mass(row, cut, target, BLOCK: tl.constexpr):
    """The cut, no wider than `cut`, of the likeliest tokens that together weigh `target`."""
    cut_key, cut_id, _, exact = cut
    best, temperature = row[4], row[5]
    # Nothing 30 below the maximum has a mass; 4 floats further, lest that was rounded.
    lowest = tl.maximum(order_key(best - 30.0 * temperature) - 4, cut_key)
    top_key = order_key(best)
    key, above = _covering_key(
        row, cut, target, tl.minimum(lowest, top_key), top_key, True, BLOCK
    )  # fmt: skip
    relative = relative_of(_of_key(key), best, temperature)
    if exact:
        each = tl.maximum(mass_of(relative), 1)
        last_id = _nth_id(row, key, (target - above + each - 1) // each, BLOCK)
        cut_id = tl.where(key == cut_key, tl.minimum(cut_id, last_id), last_id)
    return key, cut_id, relative, exact


@triton.jit
def race(row, cut, log_min_p, stream, begin, end, BLOCK: tl.constexpr):
    """The most that exp(relative) / E comes to over tokens [begin, end) of a row, and the id that
    has it; of equals the lowest; −1 and 0 where there is nothing."""
    values = tl.full([BLOCK], -1.0, dtype=tl.float32)
    winners = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        ids, mask, x, relative = _tokens(row, start, BLOCK)
        live = mask & _kept(x, ids, relative, cut) & (relative >= log_min_p)
        if tl.max(live.to(tl.int32), 0) > 0:
            value = tl.div_rn(_exp(relative), _exponential(stream, ids))
            better = live & (value > values)
            values = tl.where(better, value, values)
            winners = tl.where(better, ids, winners)
    return first_of_best(values, winners)


@triton.jit
def first_of_best(values, ids):
    """The largest value, and the lowest id that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, LAST_ID), 0)
