"""The tenant of the present request, and what the request is charged."""

from __future__ import annotations

from contextvars import ContextVar

from ...engine.errors import RateLimitError
from .key_metrics import KeyMetrics
from .rates import Rates
from .tenant import Tenant


class Caller:
    """A tenant that makes a request."""

    __slots__ = ("_metrics", "_rates", "tenant")

    def __init__(self, tenant: Tenant, rates: Rates, metrics: KeyMetrics) -> None:
        self.tenant = tenant
        self._rates = rates
        self._metrics = metrics

    @property
    def rates(self) -> Rates:
        """Where the use of all tenants is counted."""
        return self._rates

    def count_request(self) -> None:
        """Count one request. Raises RateLimitError, and then counts nothing."""
        limit, slot = self.tenant.limits.requests_per_minute, self.tenant.slot
        if limit is None:
            return
        wait = self._rates.requests(slot).wait(1, limit)
        if wait:
            raise self._refusal(f"{limit} requests a minute", wait)
        self._rates.add_request(slot)

    def admit(self, tokens: int) -> Charge | None:
        """Charge a request that is about to run for the tokens of its prompts.

        Returns None if nothing has to be counted. Raises RateLimitError, and then charges nothing.
        """
        tenant, rates, limits = self.tenant, self._rates, self.tenant.limits
        if limits.tokens_per_minute is None and limits.concurrent_requests is None:
            return Charge(tenant, None, 0) if tenant.name else None
        most = limits.concurrent_requests
        if most is not None and rates.running(tenant.slot) >= most:
            raise self._refusal(f"{most} requests at once", 1.0)
        most = limits.tokens_per_minute
        if most is not None and (wait := rates.tokens(tenant.slot).wait(tokens, most)):
            raise self._refusal(f"{most} tokens a minute; this prompt has some {tokens}", wait)
        return Charge(tenant, rates, tokens)

    def _refusal(self, limit: str, wait: float) -> RateLimitError:
        self._metrics.rejected(self.tenant.name)
        whose = f"the key {self.tenant.name}" if self.tenant.name else "this key"
        return RateLimitError(f"the limit of {whose} is {limit}", wait)


class Charge:
    """What one request is charged, from its admission to its end."""

    __slots__ = ("_rates", "_slot", "_tokens", "name")

    def __init__(self, tenant: Tenant, rates: Rates | None, tokens: int) -> None:
        """Charge `tokens`; without `rates`, count nothing, and only remember the name."""
        self.name = tenant.name
        self._slot = tenant.slot
        self._rates = rates
        self._tokens = tokens
        if rates is not None:
            rates.add_tokens(self._slot, tokens)
            rates.add_running(self._slot, 1)

    def add(self, tokens: int) -> None:
        """Charge more tokens, or give some back if the number is negative."""
        if self._rates is not None and tokens:
            self._tokens += tokens
            self._rates.add_tokens(self._slot, tokens)

    def close(self, *, computed: bool) -> None:
        """End the request; if nothing of it was `computed`, give back all tokens. Idempotent."""
        rates, self._rates = self._rates, None
        if rates is not None:
            rates.add_running(self._slot, -1)
            if not computed:
                rates.add_tokens(self._slot, -self._tokens)


present_caller: ContextVar[Caller | None] = ContextVar("present_caller", default=None)
"""Who makes the request that the present task serves; set by the route's check of the key."""


def salted(salt: str | None, *, isolated: bool) -> str | None:
    """Return the salt under which the present request's prompt is cached.

    With `isolated`, it begins with the caller, so that no other finds what it computed, whatever
    salts are sent. The two kinds never meet, if keys come and go.
    """
    caller = present_caller.get()
    if isolated and caller is not None:
        return f"key {caller.tenant.owner.hex()} {salt or ''}"
    return None if salt is None else f"salt {salt}"
