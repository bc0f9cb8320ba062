"""The protocol of a store of KV blocks, which anyone may implement."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple, Protocol


class BlockStore(Protocol):
    """Keeps records of equal size by hashes of 32 bytes, or of 33 if a model has several groups of
    layers.

    The hash of a block covers its tokens, all tokens before it, the cache salt and the LoRA
    adapter, so equal hashes mean equal K/V of one model. A store may lose any record at any time.
    It need not tell models apart or notice damage either, because each record proves what it is
    when it is read (see sealed_block.py). A method that raises counts as one that found or kept
    nothing.

    `contains` is called by the engine's thread. `load` and `store` are called by one thread each,
    which may run at the same time. `close` is called last, once.
    """

    def contains(self, hashes: abc.Sequence[bytes]) -> list[bool]:
        """Return for each hash whether `load` would probably find it. It must answer at once, from
        memory: the engine's next step waits for it."""

    def load(self, own_hash: bytes, into: memoryview) -> bool:
        """Fill `into`, which has the size of a record, and return True; or return False if the
        store has no record of this size under this hash."""

    def store(self, own_hash: bytes, record: memoryview) -> list[bytes]:
        """Keep a record, in place of one with the same hash. `record` is valid only until the
        method returns. Returns the hashes of other records that were given up for it.

        An empty `record` says that the one with this hash must be forgotten: it is damaged."""

    def close(self) -> None:
        """Let go of files, connections and memory."""


class StoreFacts(NamedTuple):
    """What a store is told of the records that it will be given.

    `fingerprint` is 32 bytes that differ between models and between layouts of the cache.
    """

    fingerprint: bytes
    record_bytes: int


MakeStore = abc.Callable[[StoreFacts], BlockStore]
"""The type of the function that `--kv-offloading-connector` names."""
