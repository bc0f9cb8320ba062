"""The passes of sample_tokens.py over one row of logits, and the arithmetic that they share.

Terms, for a token with the logit x in a row with the maximum `best`:

    relative = (x − best) / temperature       the tempered logit, at most 0
    mass     = floor(2^40 · exp(relative))    its unnormalised probability, an int64
    key      = an int32 that orders as x does

Masses are integers so that a sum does not depend on its order, and every comparison is exact: the
same tokens are kept and drawn as by the sampler in torch, whatever the layout of a pass.

Functions take two tuples. A row is (logits, list, listed, count, best, temperature): `count` tokens
whose ids are in the list of candidates if `listed` is 1, else 0, 1, 2, …. A cut is (key, id,
relative, exact) and says which tokens of a row are kept. With `exact`, tokens are ordered by
falling key and rising id and are kept up to (key, id). Otherwise all tokens are kept whose tempered
logit is at least `relative`, so that equal ones stay or go together.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...checks import interpreting

NUM_BINS = tl.constexpr(2048)
"""Bins of the histogram over −relative."""
LINEAR_BINS = tl.constexpr(1024)
"""The first bins, 64 per unit up to 16; the others are logarithmic, 128 per octave."""
LAST_ID = tl.constexpr(0x7FFFFFFF)
"""An id beyond every vocabulary."""
_INTERPRETED = tl.constexpr(interpreting())
_WAYS = tl.constexpr(16)
"""Limits per round of `_covering_key`'s search."""
# SplitMix64's constants (Steele, Lea and Flood, 2014); see the engine's counter_rng.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_INT63_MAX = tl.constexpr(2**63 - 1)
_NEGATIVE_UNIT = tl.constexpr(-(1.0 - 2.0**-24) * 2.0**-63)
"""The factor that maps 63 random bits to −u, with u inside (0, 1)."""
_MASS_UNIT = tl.constexpr(2.0**40)
"""The mass of a token whose logit is the maximum."""


@triton.jit
def _exp(x):
    """Compute exp as torch does on CUDA. Triton's interpreter has no libdevice."""
    if _INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return libdevice.exp(x)


@triton.jit
def _log1p(x):
    """Compute log(1 + x) as torch does on CUDA."""
    if _INTERPRETED:  # Kahan's formula, in which the rounding error of 1 + x cancels
        wide = x.to(tl.float64)
        one_more = 1.0 + wide
        exact = one_more == 1.0
        ratio = tl.log(one_more) / tl.where(exact, 1.0, one_more - 1.0)
        return tl.where(exact, wide, wide * ratio).to(tl.float32)
    else:
        return libdevice.log1p(x)


@triton.jit
def _mix(state):
    """Apply the finaliser of SplitMix64 to a uint64."""
    state = (state ^ (state >> 30)) * _MULTIPLIER_1
    state = (state ^ (state >> 27)) * _MULTIPLIER_2
    return state ^ (state >> 31)


@triton.jit
def stream_key(seed, position):
    """Return the key of a row's random numbers, from two int64.

    It equals the key of the engine's counter_rng bit for bit.
    """
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    return _mix(_mix(seed + _GAMMA) + (position + 1) * _GAMMA)


@triton.jit
def _exponential(key, ids):
    """Return E ~ Exp(1) for each token id in the stream `key`, by inversion: −log(1 − u).

    It equals the number of the engine's counter_rng bit for bit.
    """
    bits = _mix((ids.to(tl.uint64) + 1) * _GAMMA + key) & _INT63_MAX
    negative_u = (bits.to(tl.int64).to(tl.float32) + 0.5) * _NEGATIVE_UNIT
    return -_log1p(negative_u)


@triton.jit
def order_key(x):
    """Map float32 numbers to int32 numbers that order as they do."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _of_key(key):
    """Invert `order_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def relative_of(x, best, temperature):
    """Compute (x − best) / temperature, rounded as torch rounds it."""
    difference = x - best
    return tl.div_rn(difference, tl.broadcast_to(temperature, difference.shape))


@triton.jit
def mass_of(relative):
    """Return exp(relative), for relative ≤ 0, in units of 2^-40 as int64."""
    return (_exp(relative) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _load(logits_ptr, ids, mask):
    """Load logits as float32, with −0 turned into +0: their keys would differ."""
    return tl.load(logits_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32) + 0.0


@triton.jit
def _bin(x, best, per_unit):
    """Return the histogram bin of logit x.

    Approximate arithmetic is enough: the bin only has to be monotonic, growing as x falls.
    """
    distance = (best - x) * per_unit
    linear = tl.minimum(distance * 64.0, LINEAR_BINS - 1.0).to(tl.int32)
    bits = tl.maximum(distance, 16.0).to(tl.int32, bitcast=True)
    octaves = tl.minimum((bits >> 16) - (0x41800000 >> 16), NUM_BINS - LINEAR_BINS - 1)
    return tl.where(distance < 16.0, linear, LINEAR_BINS + octaves)


@triton.jit
def histogram(logits_ptr, best, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Count the row's tokens by bin `[NUM_BINS]` int32."""
    counts = tl.zeros([NUM_BINS], dtype=tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        bins = _bin(_load(logits_ptr, ids, ids < VOCAB), best, 1.0 / temperature)
        counts += tl.histogram(bins, NUM_BINS, mask=ids < VOCAB)
    return counts


@triton.jit
def last_bin(counts, top_k, missing, by_count):
    """Return the last bin that may hold a token that top_k or top_p keeps.

    With `by_count` the bins up to it hold `top_k` tokens. Otherwise the bins after it hold at most
    the share `missing` = 1 − top_p of the mass. One bin is added, because logits that are equal
    after the division may be on both sides of a bin's edge.
    """
    # 1. By number: count the bins before the one in which the k-th token is.
    index = tl.arange(0, NUM_BINS)
    covered = tl.cumsum(counts, 0)
    by_k = tl.sum((covered < top_k).to(tl.int32), 0)
    # 2. By mass: bound it from the counts, without reading logits. A bin's tokens weigh at most
    #    exp(−its near edge); the total is at least the linear bins' sum of exp(−their far edges).
    #    A tail within `missing` of that, even with 0.1 % for rounding, is certainly cut off.
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
    """Write the ids of the tokens in bins up to `last` to the list, in ascending order.

    Returns their number, of which the list holds at most CAPACITY, and the mass of the whole row.
    """
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
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    return size, tl.sum(masses, 0)


@triton.jit
def _tokens(row, start, BLOCK: tl.constexpr):
    """Load tokens [start, start + BLOCK) of a row.

    Returns their ids, a mask of those that exist, their logits and their tempered logits.
    """
    logits_ptr, list_ptr, listed, count, best, temperature = row
    place = start + tl.arange(0, BLOCK)
    mask = place < count
    from_list = tl.load(list_ptr + place, mask=mask & (listed > 0), other=0)
    ids = tl.where(listed > 0, from_list, place)
    x = _load(logits_ptr, ids, mask)
    return ids, mask, x, relative_of(x, best, temperature)


@triton.jit
def _kept(x, ids, relative, cut):
    """Return which of these tokens the cut keeps."""
    cut_key, cut_id, cut_relative, exact = cut
    key = order_key(x)
    before = (key > cut_key) | ((key == cut_key) & (ids <= cut_id))
    return tl.where(exact, before, relative >= cut_relative)


@triton.jit
def kept_mass(row, cut, BLOCK: tl.constexpr):
    """Return the mass of the tokens that the cut keeps."""
    masses = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, row[3], BLOCK):
        ids, mask, x, relative = _tokens(row, start, BLOCK)
        mask &= _kept(x, ids, relative, cut)
        masses += tl.where(mask, mass_of(relative), 0)
    return tl.sum(masses, 0)


@triton.jit
def _covering_key(row, cut, target, low, high, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the largest key t in [low, high] such that kept tokens with keys ≥ t weigh `target`.

    A token weighs its mass if MASS, else 1; the sum may exceed the target. Returns t, or `low` if
    there is no such key, and the weight of the kept tokens with keys above t. This is a bisection
    into 16 parts instead of two: each round reads the tokens once for 4 bits of the key.
    """
    way = tl.arange(0, _WAYS).to(tl.int64)
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    above = target * 0
    while low < high:
        # 1. Divide [low, high] into 16 intervals that begin at `limits`.
        step = (high - low) // _WAYS + 1
        limits = tl.minimum(low + way * step, high + 1).to(tl.int32)
        # 2. Weigh what is at or above each limit. The keys above `high` are in `above` already, so
        #    blocks without a key inside [low, high] are skipped.
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
        # 3. Go on in the last interval whose limit still has enough weight; what is above that
        #    interval becomes the new `above`.
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
    """Return the id of the n-th token (from 1) with this key, or LAST_ID if there are fewer."""
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
    """Return the cut that keeps the top_k best tokens of an uncut row."""
    best, temperature, exact = row[4], row[5], cut[3]
    lowest = order_key(tl.full([], float("-inf"), dtype=tl.float32))
    key, above = _covering_key(row, cut, top_k, lowest, order_key(best), False, BLOCK)
    last_id = cut[1]
    if exact:
        last_id = _nth_id(row, key, top_k - above, BLOCK)
    return key, last_id, relative_of(_of_key(key), best, temperature), exact


@triton.jit
def cut_to_mass(row, cut, target, BLOCK: tl.constexpr):
    """Return the cut, within `cut`, of the likeliest tokens that together weigh `target`."""
    cut_key, cut_id, _, exact = cut
    best, temperature = row[4], row[5]
    # 1. Find the key of the last token that is needed. Logits more than 30·temperature below the
    #    maximum have no mass (e^−30 < 2^−40); 4 ulps lower absorb the rounding of that limit.
    lowest = tl.maximum(order_key(best - 30.0 * temperature) - 4, cut_key)
    top_key = order_key(best)
    key, above = _covering_key(
        row, cut, target, tl.minimum(lowest, top_key), top_key, True, BLOCK
    )  # fmt: skip
    relative = relative_of(_of_key(key), best, temperature)
    # 2. Tokens of that key weigh the same; take only as many as are needed, lower ids first.
    if exact:
        each = tl.maximum(mass_of(relative), 1)
        last_id = _nth_id(row, key, (target - above + each - 1) // each, BLOCK)
        cut_id = tl.where(key == cut_key, tl.minimum(cut_id, last_id), last_id)
    return key, cut_id, relative, exact


@triton.jit
def race(row, cut, log_min_p, stream, begin, end, BLOCK: tl.constexpr):
    """Draw one of tokens [begin, end) of a row, among those that the cut and min_p keep.

    This is an exponential race: the largest exp(relative) / E wins, with an independent E ~ Exp(1)
    for each token, so that token i wins with its probability (the Gumbel-max trick in other terms).
    Returns the winner's value and id, the lowest id among equals, or (−1, 0) if no token is left.
    """
    # 1. Each lane keeps the best of the tokens that it has seen; a block in which nothing is left
    #    needs no random numbers. Lanes see ids in ascending order, so `>` keeps the lowest.
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
    # 2. The best lane wins.
    return first_of_best(values, winners)


@triton.jit
def first_of_best(values, ids):
    """Return the largest value and the lowest id that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, LAST_ID), 0)
