"""API keys. Each route declares the key it needs; paths and Host headers never decide it.

/ with the files of its page, /docs, /openapi.json, /health, /ready, /live, /ping, /load, /version
and /metrics need no key: probes, scrapers and browsers that open a page send none, and these routes
reveal nothing of any request's content. All other routes need a client's key or the admin key if
client keys are configured. Admin routes need the admin key and are refused if none is configured.
The debug views need the admin key unless no keys are configured at all. A key is sent as
`Authorization: Bearer KEY`, or as `x-api-key: KEY` by Anthropic's clients.

The key decides who makes the request: `request.state.caller` and `present_caller` (tenants) say so
from then on, although the key may become invalid while the request runs.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi.security import HTTPBearer
from starlette.requests import HTTPConnection

from ...engine.errors import AuthenticationError, RateLimitError
from ..tenants.caller import Caller, present_caller
from ..tenants.key_metrics import KeyMetrics
from ..tenants.key_ring import KeyRing
from ..tenants.rates import Rates
from ..tenants.tenant import Tenant


class Keys:
    """Who may call which route, by the keys that are valid now."""

    def __init__(self, ring: KeyRing, rates: Rates, metrics: KeyMetrics) -> None:
        self.ring = ring
        self._rates = rates
        self._metrics = metrics

    @property
    def has_several(self) -> bool:
        """Whether there is more than one key with which prompts can be sent."""
        return self.ring.has_several

    def check_client(self, request: HTTPConnection) -> Caller:
        """Raise AuthenticationError unless the request has a client's or the admin key.

        Accept every request if no client keys are configured.
        """
        if not self.ring.has_clients:
            return self._caller(self.ring.nobody)
        return self._caller(self._find(request))

    def check_admin(self, request: HTTPConnection) -> Caller:
        """Raise AuthenticationError unless the request has the key of an admin."""
        tenant = self._find(request)
        if not tenant.is_admin:
            raise _wrong()
        return self._caller(tenant)

    def check_debug(self, request: HTTPConnection) -> Caller:
        """Like `check_admin`, but accept every request if no keys are configured at all."""
        if self.ring.has_clients or self.ring.has_admins:
            return self.check_admin(request)
        return self._caller(self.ring.nobody)

    def owner(self, request: HTTPConnection) -> bytes:
        """Return what identifies the holder of the key that `request` was accepted for.

        Empty if no client keys are configured.
        """
        caller: Caller = request.state.caller
        return caller.tenant.owner

    def _find(self, request: HTTPConnection) -> Tenant:
        tenant = self.ring.find(_sent(request))
        if tenant is None:
            raise _wrong()
        return tenant

    def _caller(self, tenant: Tenant) -> Caller:
        return Caller(tenant, self._rates, self._metrics)


def _wrong() -> AuthenticationError:
    return AuthenticationError("the API key is missing or wrong")


def _sent(request: HTTPConnection) -> list[str]:
    """Return the keys in the headers of `request`, at most two. An empty one is none."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    if "x-api-key" in request.headers:
        keys.append(request.headers["x-api-key"])
    return [key for key in keys if key]


class KeyRequired(HTTPBearer):
    """A route dependency that runs `check`; FastAPI documents it as a bearer token."""

    def __init__(
        self, check: Callable[[Keys, HTTPConnection], Caller], *, counts: bool = False
    ) -> None:
        """With `counts`, the requests that bring a body count for their key's limits."""
        super().__init__(scheme_name="key", auto_error=False)
        self._check = check
        self._counts = counts

    async def __call__(self, request: HTTPConnection) -> None:
        state = request.app.state.quire
        caller = self._check(state.keys, request)
        request.state.caller = caller
        present_caller.set(caller)
        # The worker that forwarded a request has counted it.
        forwarded = getattr(request.state, "forwarded", False)
        if self._counts and request.scope["method"] == "POST":
            request.state.counted = caller
            if not forwarded:
                try:
                    caller.count_request()
                except RateLimitError as error:
                    state.metrics.request_rejected(error.code)
                    raise


require_client_key = KeyRequired(Keys.check_client, counts=True)
require_admin_key = KeyRequired(Keys.check_admin)
require_debug_key = KeyRequired(Keys.check_debug)
