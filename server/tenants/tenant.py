"""A tenant: whoever holds an API key. Keys themselves are never kept, only their digests."""

from __future__ import annotations

import hashlib

import msgspec

from ..settings import Settings


class Limits(msgspec.Struct, frozen=True):
    """The most that a tenant may ask for; None means any amount."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Return the limits that the flags set for every tenant."""
        return cls(
            settings.limit_requests_per_minute,
            settings.limit_tokens_per_minute,
            settings.limit_concurrent_requests,
        )


class Tenant(msgspec.Struct, frozen=True):
    """The holder of one or more keys.

    `owner` identifies the tenant for as long as the server runs: what it stored belongs to it, and
    its prompts are cached under it. It is a digest of the name, so that a key may be exchanged, or
    of the key if it has no name. `slot` is where its use is counted (see rates.py).
    """

    owner: bytes = b""
    name: str = ""
    """The name in the file of keys; empty for keys of flags and without keys."""
    digests: tuple[bytes, ...] = ()
    is_admin: bool = False
    is_client: bool = True
    """Whether it is one of those for which the other routes ask a key. The key of --admin-api-key
    opens them too, but without a client's key they stay open."""
    limits: Limits = Limits()
    models: tuple[str, ...] | None = None
    """The names of the models and adapters that it may use; None means all."""
    slot: int = 0

    def may_use(self, model: str) -> bool:
        """Return whether it may use the model or adapter of this name."""
        return self.models is None or model in self.models


def digest_of(key: str) -> bytes:
    """Return the SHA-256 digest by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def owner_of(name: str) -> bytes:
    """Return the `owner` of the tenant of this name."""
    return hashlib.sha256(b"tenant:" + name.encode()).digest()
