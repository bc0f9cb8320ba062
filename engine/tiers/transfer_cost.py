"""Whether loading a block is faster than computing its tokens, as measured while serving."""

from __future__ import annotations

MIN_TOKENS = 32
"""Steps of fewer tokens are not measured: their time is that of the weights, not of the tokens."""
_MEMORY = 0.8
"""Weight of what was known when something else is measured."""
_RECOVERY = 0.99
_OUTLIER = 4.0
"""A measurement this many times larger than expected was held up by something else."""


class _Mean:
    """A running mean that one bad measurement moves little. 0 until there is one."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, measured: float) -> None:
        if self.value:
            measured = min(measured, _OUTLIER * self.value)
            self.value = _MEMORY * self.value + (1 - _MEMORY) * measured
        else:
            self.value = measured


class TransferCost:
    """Compares the seconds of a block's way with those of computing its tokens.

    Until both are measured, loading is assumed to pay: it is then done, and measured.
    """

    def __init__(self, block_size: int, copy_seconds: float) -> None:
        """`copy_seconds` are those of one block between the device and host memory, one way."""
        self._block_size = block_size
        self.copy_seconds = copy_seconds
        self._token = _Mean()
        self._below = _Mean()

    def observe_step(self, tokens: int, seconds: float) -> None:
        """Learn that a step of so many tokens took so long."""
        if tokens >= MIN_TOKENS and seconds > 0:
            self._token.add(seconds / tokens)

    def observe_load(self, seconds: float) -> None:
        """Learn that the store below took so long for a block."""
        if seconds > 0:
            self._below.add(seconds)

    def compute_seconds(self, num_blocks: int) -> float:
        """Return how long computing the tokens of so many blocks takes; 0 if that is not known."""
        return num_blocks * self._block_size * self._token.value

    @property
    def copy_pays(self) -> bool:
        """Whether a block's way to host memory and back is faster than computing it again."""
        computed = self.compute_seconds(1)
        return not computed or 2 * self.copy_seconds < computed

    def load_pays(self) -> bool:
        """Return whether a block's way from the store below to the device is. Each time that it is
        not, the store is expected to be a little faster, so that it is tried again some day."""
        computed = self.compute_seconds(1)
        if not computed or self._below.value + self.copy_seconds < computed:
            return True
        self._below.value *= _RECOVERY
        return False
