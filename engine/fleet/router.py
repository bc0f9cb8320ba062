"""Chooses an engine for a request.

Every engine has a price for a request, in tokens of prefill: how many tokens its device would
compute before the request's first one, and what the request costs the others there.

    price = uncached + waiting + DECODE · sequences + EVICTION · block_size · evicted
            [+ ADAPTER]

`uncached` are the prompt's tokens that the engine has not cached, `waiting` the tokens that it has
still to compute for requests before this one, `sequences` those that it serves, and `evicted` the
cached blocks of others that the prompt's new blocks would take the place of. ADAPTER is added if
the request's LoRA adapter is in none of the engine's slots. So a cached prefix attracts a request
only as long as waiting for it is cheaper than computing it elsewhere: an affinity without this
bound overloads the engine that has a popular prefix. The form of the price is that of NVIDIA
Dynamo's KV router.

The cheapest engine gets the request. Among those that are about as cheap, rendezvous hashing by the
prompt's first block decides: so processes that route independently, and know of each other's
requests only a step later, send equal prompts to the same engine.
"""

from __future__ import annotations

from collections import abc
from hashlib import blake2b
from typing import NamedTuple

from .kv_index import KVIndex

DECODE = 16.0
"""Price of a sequence that the engine serves, in tokens: what it adds to the steps in which a
prompt is computed. An estimate."""
EVICTION = 0.25
"""Price of evicting a cached token, in tokens: the chance that somebody would have used it. An
estimate."""
ADAPTER = 64.0
"""Price of filling a slot with an adapter, in tokens: some milliseconds of copying, and perhaps
another adapter that has to be copied again. An estimate."""
SLACK = 0.05
"""Share of the lowest price by which an engine's price may be higher and still count as equal."""


class EngineState(NamedTuple):
    """What an engine has to do, with what was sent to it and not yet reported.

    `waiting_tokens` have still to be computed; `free_blocks` hold nothing that can be found. If
    groups of layers have blocks of their own, one of these is a block of each. `lacks_adapter` says
    that the request has an adapter and none of the slots has it.
    """

    engine: str
    waiting_tokens: int
    num_sequences: int
    free_blocks: int
    lacks_adapter: bool = False


class Choice(NamedTuple):
    """The engine for a request, and how many tokens of the prompt it is expected to have cached."""

    engine: str
    predicted_cached_tokens: int


class Router:
    """Chooses by price. It has no state but the index, and does no I/O."""

    def __init__(
        self,
        index: KVIndex,
        block_size: int,
        *,
        decode: float = DECODE,
        eviction: float = EVICTION,
        slack: float = SLACK,
    ) -> None:
        self.index = index
        self._block_size = block_size
        self._decode = decode
        self._eviction = eviction
        self._slack = slack

    def choose(
        self,
        hashes: abc.Sequence[bytes],
        num_tokens: int,
        states: abc.Sequence[EngineState],
        now: float,
        tie_key: bytes | None = None,
    ) -> Choice:
        """Choose one of the engines of `states`, of which there is at least one.

        `hashes` are those of the prompt's full blocks, and `num_tokens` is its length. Ties are
        decided by `tie_key`, such as a session's id; by default it is the first hash.
        """
        # 1. The price of each engine. At least one token is always computed.
        size, cached = self._block_size, self.index.match(hashes, now)
        decode, eviction = self._decode, self._eviction * size
        needed = -(-num_tokens // size)
        prices: list[float] = []
        for engine, waiting, sequences, free, lacks_adapter in states:
            blocks = cached.get(engine, 0)
            price = max(num_tokens - blocks * size, 1) + waiting + decode * sequences
            if lacks_adapter:
                price += ADAPTER
            evicted = needed - blocks - free
            prices.append(price + eviction * evicted if evicted > 0 else price)
        # 2. Those that are about as cheap as the cheapest.
        limit = min(prices) * (1 + self._slack)
        close = [states[i].engine for i, price in enumerate(prices) if price <= limit]
        # 3. One of them.
        engine = close[0]
        if len(close) > 1:
            key = tie_key or (hashes[0] if hashes else num_tokens.to_bytes(8, "big"))
            engine = max(close, key=lambda one: _weight(key, one))
        tokens = min(cached.get(engine, 0) * size, num_tokens - 1)
        return Choice(engine, tokens)


def _weight(key: bytes, engine: str) -> bytes:
    """Return the weight of an engine for this key; the highest one wins (rendezvous hashing, Thaler
    and Ravishankar, 1998). When an engine comes or goes, only its own keys move."""
    return blake2b(key + engine.encode(), digest_size=8).digest()
