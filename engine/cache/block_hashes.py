"""The hashes that identify full blocks. The engine and whoever routes requests to it compute them
by the same functions.

A block's hash covers its tokens and all tokens before it, because each is chained to the one before
(the idea is that of vLLM's automatic prefix caching). The chain is seeded by the cache salt and by
the LoRA adapter (its name and a hash of its weights) and by nothing else, so the hashes of a prompt
are the same in every process and on every machine (of little-endian byte order, as all that are
supported).
"""

from __future__ import annotations

from array import array
from collections import abc
from hashlib import sha256
from typing import NamedTuple

HASH_BYTES = 32
"""Bytes of a hash in the first group of layers. In any other, one more says which it is."""
HasBlock = abc.Callable[[bytes], bool]
"""Whether the block with a hash can be had."""


class WantedBlock(NamedTuple):
    """A full block that a sequence's match takes: its place in the table, the hash of all tokens
    before it, and its own. Both hashes are those of the block's group of layers."""

    place: int
    parent: bytes
    own_hash: bytes


def root_hash(cache_salt: str | None, adapter: str | None = None) -> bytes:
    """Return the hash that starts a chain. Chains of different salts never meet, nor do those of
    different adapters or of different versions of one; `adapter` is its `lora.adapter_key`."""
    root = sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode()).digest()
    return root if adapter is None else sha256(root + b"adapter:" + adapter.encode()).digest()


def hash_block(parent: bytes, token_ids: abc.Sequence[int]) -> bytes:
    """Return the hash of a full block and all tokens before it.

    It is SHA-256, because a collision would let one client read another's prompt.
    """
    return sha256(parent + array("I", token_ids).tobytes()).digest()


def of_group(own_hash: bytes, group: int) -> bytes:
    """Return the hash of the same tokens in another group of layers; group 0 has the hash itself.

    No hash of one group is a hash of another, and a block's own hash follows its parent's.
    """
    return own_hash + bytes((group,)) if group else own_hash


def group_of(own_hash: bytes) -> int:
    """Return the group of layers of the block with this hash."""
    return own_hash[HASH_BYTES] if len(own_hash) > HASH_BYTES else 0


def is_first_group(own_hash: bytes) -> bool:
    """Return whether the block with this hash is one of the first group of layers."""
    return len(own_hash) == HASH_BYTES


def extend_hashes(
    hashes: list[bytes], root: bytes, token_ids: abc.Sequence[int], block_size: int, count: int
) -> None:
    """Append the hashes of the blocks that follow, until there are `count` of them.

    `hashes` are those of the first blocks of `token_ids`, in a chain that starts with `root`.
    """
    for i in range(len(hashes), count):
        parent = hashes[-1] if hashes else root
        hashes.append(hash_block(parent, token_ids[i * block_size : (i + 1) * block_size]))


def prompt_hashes(
    token_ids: abc.Sequence[int],
    block_size: int,
    cache_salt: str | None = None,
    adapter: str | None = None,
) -> list[bytes]:
    """Return the hashes of all full blocks of a prompt, in order."""
    hashes: list[bytes] = []
    root = root_hash(cache_salt, adapter)
    extend_hashes(hashes, root, token_ids, block_size, len(token_ids) // block_size)
    return hashes
