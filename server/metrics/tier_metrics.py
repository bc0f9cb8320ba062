"""Metrics of the tiers where evicted KV blocks go. They exist if the engine has any."""

from __future__ import annotations

from collections.abc import Iterable

from ...engine.outputs import TierStats
from .families import Families

_COUNTERS = {
    "stored": ("kv_tier_stored_blocks", "copied to the tier"),
    "loaded": ("kv_tier_loaded_blocks", "copied from the tier"),
    "dropped": (
        "kv_tier_dropped_blocks",
        "given up for lack of room, or since computing them anew is faster",
    ),
    "failures": (
        "kv_tier_failed_blocks",
        "that could not be stored, or not be loaded whole and intact",
    ),
}
"""Fields of TierStats that count since the engine's start → name, and what the help says of their
blocks."""
_BYTES = ("stored", "loaded")
"""Those of them whose bytes are counted as well."""
TIER_FAMILIES = (
    "kv_tier_blocks",
    *(name for name, _ in _COUNTERS.values()),
    *(f"kv_tier_{field}_bytes" for field in _BYTES),
)
"""Families, without prefix."""


class TierMetrics:
    """Shows one engine's tiers under the label `tier`."""

    def __init__(self, families: Families) -> None:
        self._blocks = families.gauge_by("kv_tier_blocks", "Blocks that the tier holds.", "tier")
        self._counters = {
            field: families.counter_by(name, f"Blocks {text}.", "tier")
            for field, (name, text) in _COUNTERS.items()
        }
        self._bytes = {
            field: families.counter_by(
                f"kv_tier_{field}_bytes", f"Bytes of blocks {_COUNTERS[field][1]}.", "tier"
            )
            for field in _BYTES
        }

    def observe(self, tiers: Iterable[TierStats], last: Iterable[TierStats]) -> None:
        """Record the tiers after a step; `last` are those after the step before, if there was one
        since the engine's start."""
        before = {one.tier: one for one in last}
        for one in tiers:
            self._blocks(one.tier).set(one.num_blocks)
            for field, counter in self._counters.items():
                old = getattr(before[one.tier], field) if one.tier in before else 0
                count = getattr(one, field) - old
                counter(one.tier).inc(count)
                if field in self._bytes:
                    self._bytes[field](one.tier).inc(count * one.block_bytes)
