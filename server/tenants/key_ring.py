"""The keys that are valid now: those of the flags and those of the file, which may change."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from ...engine.errors import ConfigurationError
from ..settings import Settings
from .keys_file import read_keys_file
from .rates import MAX_SLOTS
from .tenant import Limits, Tenant, digest_of

POLL_SECONDS = 1.0
"""Seconds between two looks at the file. A change is read when it is as old as that, since the file
may be written in several pieces."""

log = structlog.get_logger(__name__)

_Stamp = tuple[int, int, int] | None


class KeyRing:
    """Finds the tenant of a key. `tenants` may be replaced at any time."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self.replace(tenants)

    def replace(self, tenants: Iterable[Tenant]) -> None:
        """Let the keys of `tenants` be the valid ones; the first tenant is that of requests without
        a key."""
        self.nobody, *named = tenants
        self._by_digest = {digest: tenant for tenant in named for digest in tenant.digests}
        self.has_clients = any(tenant.is_client for tenant in named)
        self.has_admins = any(tenant.is_admin for tenant in named)
        self.has_several = self.has_clients and len(named) > 1
        """Whether there is more than one tenant whose prompts may be told apart."""

    def find(self, keys: Iterable[str]) -> Tenant | None:
        """Return the tenant of the first of `keys` that is valid.

        Digests are looked up, not keys: how long that takes tells nothing that a client could use,
        since it cannot choose how a digest begins.
        """
        for digest in map(digest_of, keys):
            tenant = self._by_digest.get(digest)
            if tenant is not None and any(hmac.compare_digest(digest, d) for d in tenant.digests):
                return tenant
        return None


class KeySource:
    """Where the keys come from. It gives each tenant its slot, the same one as long as it runs."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys. Raises ConfigurationError."""
        self._path = settings.api_keys_file
        self._limits = Limits.of(settings)
        self._slots: dict[bytes, int] = {b"": 0}
        self._of_flags = [Tenant(limits=self._limits), *_tenants_of_flags(settings, self._limits)]
        self._stamp = self._look()
        self.tenants = self._read()

    async def watch(self, apply: Callable[[Sequence[Tenant]], None]) -> None:
        """Call `apply` with all tenants whenever the file has changed. A file that is broken or
        missing is logged, and the keys stay as they are. Never returns."""
        seen = pending = self._stamp
        while True:
            await asyncio.sleep(POLL_SECONDS)
            stamp = await asyncio.to_thread(self._look)
            if stamp == seen or stamp != pending:
                pending = stamp
                continue
            seen = stamp
            before = {tenant.name for tenant in self.tenants}
            try:
                self.tenants = await asyncio.to_thread(self._read)
            except ConfigurationError as error:
                log.error("keys_file_refused", error=error.message)
                continue
            names = {tenant.name for tenant in self.tenants}
            log.info("keys_changed", added=sorted(names - before), removed=sorted(before - names))
            apply(self.tenants)

    def _look(self) -> _Stamp:
        """Return what changes whenever the file does; None if it is not there."""
        if self._path is None:
            return None
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _read(self) -> list[Tenant]:
        tenants = list(self._of_flags)
        if self._path is not None:
            tenants += _without_conflicts(self._path, self._limits, tenants)
        new = [tenant.owner for tenant in tenants if tenant.owner not in self._slots]
        if len(self._slots) + len(new) > MAX_SLOTS:
            raise ConfigurationError(
                f"api_keys_file: more than {MAX_SLOTS - 1} keys and names since the server started"
            )
        for owner in new:
            self._slots[owner] = len(self._slots)
        return [replace(tenant, slot=self._slots[tenant.owner]) for tenant in tenants]


def _tenants_of_flags(settings: Settings, limits: Limits) -> list[Tenant]:
    """Return the tenants of --api-key and --admin-api-key. A key of both is one of an admin."""
    admin = settings.admin_api_key
    tenants = []
    for key in dict.fromkeys(settings.api_key):
        digest = digest_of(key)
        tenants.append(
            Tenant(
                owner=digest,
                digests=(digest,),
                is_admin=key == admin,
                limits=Limits() if key == admin else limits,
            )
        )
    if admin is not None and admin not in settings.api_key:
        digest = digest_of(admin)
        tenants.append(Tenant(owner=digest, digests=(digest,), is_admin=True, is_client=False))
    return tenants


def _without_conflicts(path: Path, limits: Limits, others: Sequence[Tenant]) -> list[Tenant]:
    """Return the tenants of the file. Raises ConfigurationError if one has a key of `others`."""
    taken = {digest for tenant in others for digest in tenant.digests}
    tenants = read_keys_file(path, limits)
    for tenant in tenants:
        if not taken.isdisjoint(tenant.digests):
            raise ConfigurationError(
                f"api_keys_file: the key of {tenant.name} is also given by a flag or a variable"
            )
    return tenants
