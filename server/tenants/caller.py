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

    @property
    def num_waiting(self) -> int:
        """Sequences of this tenant that wait for their first token."""
        return self._rates.waiting(self.tenant.slot)

    def may_wait_beside_others(self, num_sequences: int, places: int) -> bool:
        """Return whether others' requests wait, and this tenant's with `num_sequences` more are
        within its share of so many places: those that wait share them evenly."""
        waiting = self._rates.slots_waiting() | {self.tenant.slot}
        share = places // len(waiting)
        return len(waiting) > 1 and self.num_waiting + num_sequences <= share

    def admit(self, tokens: int, num_sequences: int) -> Charge:
        """Charge a request that is about to run for the tokens of its prompts, and count its
        sequences as waiting.

        Raises RateLimitError, and then charges nothing.
        """
        tenant, rates, limits = self.tenant, self._rates, self.tenant.limits
        most = limits.concurrent_requests
        if most is not None and rates.running(tenant.slot) >= most:
            raise self._refusal(f"{most} requests at once", 1.0)
        most = limits.tokens_per_minute
        if most is not None and (wait := rates.tokens(tenant.slot).wait(tokens, most)):
            raise self._refusal(f"{most} tokens a minute; this prompt has some {tokens}", wait)
        return Charge(tenant, rates, tokens, num_sequences)

    def _refusal(self, limit: str, wait: float) -> RateLimitError:
        self._metrics.rejected(self.tenant.name)
        whose = f"the key {self.tenant.name}" if self.tenant.name else "this key"
        return RateLimitError(f"the limit of {whose} is {limit}", wait)


class Charge:
    """What one request is charged, from its admission to its end."""

    __slots__ = ("_rates", "_slot", "_tokens", "_waiting", "name")

    def __init__(self, tenant: Tenant, rates: Rates, tokens: int, num_sequences: int) -> None:
        self.name = tenant.name
        self._slot = tenant.slot
        self._rates: Rates | None = rates
        self._tokens = tokens
        self._waiting = num_sequences
        rates.add_tokens(self._slot, tokens)
        rates.add_running(self._slot, 1)
        rates.add_waiting(self._slot, num_sequences)

    def add(self, tokens: int) -> None:
        """Charge more tokens, or give some back if the number is negative."""
        if self._rates is not None and tokens:
            self._tokens += tokens
            self._rates.add_tokens(self._slot, tokens)

    def started(self) -> None:
        """Count the sequences as waiting no longer. Idempotent."""
        if self._rates is not None and self._waiting:
            self._rates.add_waiting(self._slot, -self._waiting)
            self._waiting = 0

    def close(self, *, computed: bool) -> None:
        """End the request; if nothing of it was `computed`, give back all tokens. Idempotent."""
        self.started()
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
