"""A block's K/V as a record that proves what it is.

A record is a header and the K/V. The header has a magic, the format's version, the fingerprint of
the model and of the cache's layout, the block's group of layers and its hash, the length of the
K/V, and the SHA-256 of all these and of the K/V. So a record that is damaged, cut, of another model
or under a wrong hash is recognised whatever kept it, and is never used.
"""

from __future__ import annotations

import struct
from hashlib import sha256

from ..cache.block_hashes import HASH_BYTES, group_of

MAGIC = b"quire KV"
VERSION = 1
_FACTS = struct.Struct("<8sHH32s32sQ")
DIGEST_BYTES = 32
HEADER_BYTES = _FACTS.size + DIGEST_BYTES


def seal(fingerprint: bytes, own_hash: bytes, content: memoryview, into: memoryview) -> None:
    """Write the record of a block into `into`, which is HEADER_BYTES longer than its content."""
    facts = _facts(fingerprint, own_hash, len(content))
    into[: _FACTS.size] = facts
    into[HEADER_BYTES:] = content
    into[_FACTS.size : HEADER_BYTES] = _digest(facts, content)


def unseal(fingerprint: bytes, own_hash: bytes, record: memoryview) -> memoryview | None:
    """Return the content of a record, or None if it is not that of this block, whole and intact."""
    content = record[HEADER_BYTES:]
    facts = _facts(fingerprint, own_hash, len(content))
    if record[: _FACTS.size] != facts:
        return None
    if record[_FACTS.size : HEADER_BYTES] != _digest(facts, content):
        return None
    return content


def _facts(fingerprint: bytes, own_hash: bytes, length: int) -> bytes:
    group, tokens = group_of(own_hash), own_hash[:HASH_BYTES]
    return _FACTS.pack(MAGIC, VERSION, group, fingerprint, tokens, length)


def _digest(facts: bytes, content: memoryview) -> bytes:
    digest = sha256(facts)
    digest.update(content)
    return digest.digest()
