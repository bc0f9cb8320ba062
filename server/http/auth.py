"""API keys. Which key a route asks for is decided by the route, never by a path or a Host header.

Open without a key: /, /health, /ready, /version and /metrics (probes and scrapers carry none, and
they tell nothing of a request's content). Everything else asks for a client's or the admin key
once one is configured; admin routes ask for the admin key and are refused where there is none.
The debug view asks for the admin key, or is open where no key at all is configured. A key comes as
`Authorization: Bearer KEY`, or as `x-api-key: KEY`, which Anthropic's clients send.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from fastapi.security import HTTPBearer
from starlette.requests import HTTPConnection

from ...engine.errors import AuthenticationError
from ..settings import Settings


class Keys:
    """Digests of the configured keys, compared in constant time whatever the length sent."""

    def __init__(self, settings: Settings) -> None:
        self._admin = [_digest(settings.admin_api_key)] if settings.admin_api_key else []
        self._client = [_digest(key) for key in settings.api_key]

    def check_client(self, request: HTTPConnection) -> None:
        """Raises AuthenticationError unless a client's or the admin key came, or none is set."""
        if self._client:
            _check(request, self._client + self._admin)

    def check_admin(self, request: HTTPConnection) -> None:
        """Raises AuthenticationError unless the admin key came; always where none is set."""
        _check(request, self._admin)

    def check_debug(self, request: HTTPConnection) -> None:
        """As `check_admin`, but open where the server has no keys at all."""
        if self._admin or self._client:
            _check(request, self._admin)

    def owner(self, request: HTTPConnection) -> bytes:
        """Tells the holders of different keys apart: the digest of the key that let `request` in,
        or nothing where the server has none."""
        if not self._client:
            return b""
        accepted = (*self._client, *self._admin)
        return next(digest for digest in map(_digest, _sent(request)) if digest in accepted)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check(request: HTTPConnection, accepted: list[bytes]) -> None:
    # Every key is compared, so that the time does not tell which one came close.
    matches = [
        hmac.compare_digest(sent, digest)
        for sent in map(_digest, _sent(request))
        for digest in accepted
    ]
    if not any(matches):
        raise AuthenticationError("the API key is missing or wrong")


def _sent(request: HTTPConnection) -> list[str]:
    """The keys that came, at most two."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    if "x-api-key" in request.headers:
        keys.append(request.headers["x-api-key"])
    return keys


class KeyRequired(HTTPBearer):
    """A dependency of routes that runs `check`; FastAPI documents it as a bearer token."""

    def __init__(self, check: Callable[[Keys, HTTPConnection], None]) -> None:
        super().__init__(scheme_name="key", auto_error=False)
        self._check = check

    async def __call__(self, request: HTTPConnection) -> None:
        self._check(request.app.state.quire.keys, request)


require_client_key = KeyRequired(Keys.check_client)
require_admin_key = KeyRequired(Keys.check_admin)
require_debug_key = KeyRequired(Keys.check_debug)
