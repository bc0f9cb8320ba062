"""Compare the hash with its published form, and the numbers with their distribution."""

from __future__ import annotations

import math

import pytest
import torch

from quire.engine.sampling.counter_rng import exponential, stream_keys

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """Compute SplitMix64's finaliser over Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unmix(z: int) -> int:
    z ^= (z >> 31) ^ (z >> 62)
    z = (z * pow(0x94D049BB133111EB, -1, 2**64)) & MASK
    z ^= (z >> 27) ^ (z >> 54)
    z = (z * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & MASK
    return z ^ (z >> 30) ^ (z >> 60)


def uniform(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return 1 - torch.exp(-exponential(keys, token_ids).double())


def chi_square(values: torch.Tensor, bins: int) -> float:
    """Return the chi-square statistic as a z-score (Wilson and Hilferty 1931)."""
    counts = torch.histc(values, bins=bins, min=0.0, max=1.0)
    expected = values.numel() / bins
    statistic = float(((counts - expected) ** 2).sum() / expected)
    freedom = bins - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_reference_splitmix() -> None:
    """These are the first outputs for state 1234567 that the generator's reference code prints."""
    outputs = [mix((1234567 + n * GAMMA) & MASK) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hash_is_splitmix64() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    positions = [0, 1, 77, 4095, 10**6, 3]
    token_ids = torch.tensor([0, 1, 2, 150_000])
    keys = stream_keys(torch.tensor(seeds), torch.tensor(positions))
    drawn = exponential(keys, token_ids)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = mix((mix((seed + GAMMA) & MASK) + (position + 1) * GAMMA) & MASK)
        assert int(keys[row]) & MASK == key
        for column, token_id in enumerate(token_ids.tolist()):
            bits = mix((key + (token_id + 1) * GAMMA) & MASK) & (2**63 - 1)
            expected = -math.log1p(-min((bits + 0.5) / 2**63, 1 - 2**-24))
            assert float(drawn[row, column]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_draws_are_positive_and_finite_at_the_ends_of_the_range(bits: int) -> None:
    key = (unmix(bits) - GAMMA) & MASK
    drawn = float(exponential(torch.tensor([key - ((key >> 63) << 64)]), torch.tensor([0])))
    assert 0.0 < drawn < 20.0


@pytest.mark.parametrize("axis", ["token ids", "positions", "seeds"])
def test_uniform_along_every_axis(axis: str) -> None:
    count = 200_000
    line, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    if axis == "token ids":
        values = uniform(stream_keys(zero[:1], zero[:1]), line)[0]
    elif axis == "positions":
        values = uniform(stream_keys(zero, line), zero[:1])[:, 0]
    else:
        values = uniform(stream_keys(line, zero), zero[:1])[:, 0]
    assert abs(chi_square(values, 1000)) < 4
    # Serial independence: of neighbours, and of the pairs' joint distribution.
    centred = values - 0.5
    for lag in (1, 2, 64, 1024):
        correlation = float((centred[:-lag] * centred[lag:]).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(count)
    cells = (values[0::2] * 30).floor() * 30 + (values[1::2] * 30).floor()
    assert abs(chi_square((cells + 0.5) / 900, 900)) < 4


def test_independent_between_axes() -> None:
    """Neighbouring seeds, positions and both at once draw unrelated numbers for one token."""
    size = 300
    grid = torch.arange(size)
    keys = stream_keys(grid.repeat_interleave(size), grid.repeat(size))
    assert len(keys.unique()) == size * size
    values = uniform(keys, torch.tensor([7]))[:, 0].view(size, size) - 0.5
    upper = torch.ones(size, size, dtype=torch.bool).triu(1)
    pairs = {
        "seeds": (values[1:], values[:-1]),
        "positions": (values[:, 1:], values[:, :-1]),
        "diagonal": (values[1:, :-1], values[:-1, 1:]),
        "seed and position exchanged": (values[upper], values.T[upper]),
    }
    for name, (left, right) in pairs.items():
        correlation = float((left * right).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(left.numel()), name


def test_no_bit_is_stuck() -> None:
    keys = stream_keys(torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64))
    for bit in range(64):
        share = float(((keys >> bit) & 1).float().mean())
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(keys))


def test_token_lists_may_differ_by_row() -> None:
    keys = stream_keys(torch.tensor([1, 2]), torch.tensor([3, 4]))
    table = exponential(keys, torch.arange(50))
    chosen = torch.tensor([[4, 49, 0], [7, 7, 30]])
    assert exponential(keys, chosen).equal(table.gather(1, chosen))
