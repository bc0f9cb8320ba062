"""API keys. Each route declares the key it needs; paths and Host headers never decide it.

/ with the files of its page, /docs, /openapi.json, /health, /ready, /live, /ping, /load, /version
and /metrics need no key: probes, scrapers and browsers that open a page send none, and these routes
reveal nothing of any request's content. All other routes need a client's key or the admin key if
client keys are configured. Admin routes need the admin key and are refused if none is configured.
The debug views need the admin key unless no keys are configured at all. A key is sent as
`Authorization: Bearer KEY`, or as `x-api-key: KEY` by Anthropic's clients.
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
    """The configured keys as digests, so that comparing takes the same time for any length."""

    def __init__(self, settings: Settings) -> None:
        self._admin = [] if settings.admin_api_key is None else [_digest(settings.admin_api_key)]
        self._client = [_digest(key) for key in settings.api_key]

    def check_client(self, request: HTTPConnection) -> None:
        """Raise AuthenticationError unless the request has a client's or the admin key.

        Accept every request if no client keys are configured.
        """
        if self._client:
            _check(request, self._client + self._admin)

    def check_admin(self, request: HTTPConnection) -> None:
        """Raise AuthenticationError unless the request has the admin key."""
        _check(request, self._admin)

    def check_debug(self, request: HTTPConnection) -> None:
        """Like `check_admin`, but accept every request if no keys are configured at all."""
        if self._admin or self._client:
            _check(request, self._admin)

    def owner(self, request: HTTPConnection) -> bytes:
        """Return the digest of the key that `request` was accepted for, to identify its holder.

        Empty if no client keys are configured.
        """
        if not self._client:
            return b""
        accepted = (*self._client, *self._admin)
        return next(digest for digest in map(_digest, _sent(request)) if digest in accepted)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check(request: HTTPConnection, accepted: list[bytes]) -> None:
    # Compare with every key, so that the time does not reveal which one came close.
    matches = [
        hmac.compare_digest(sent, digest)
        for sent in map(_digest, _sent(request))
        for digest in accepted
    ]
    if not any(matches):
        raise AuthenticationError("the API key is missing or wrong")


def _sent(request: HTTPConnection) -> list[str]:
    """Return the keys in the headers of `request`, at most two. An empty one is none."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    if "x-api-key" in request.headers:
        keys.append(request.headers["x-api-key"])
    return [key for key in keys if key]


class KeyRequired(HTTPBearer):
    """A route dependency that runs `check`; FastAPI documents it as a bearer token."""

    def __init__(self, check: Callable[[Keys, HTTPConnection], None]) -> None:
        super().__init__(scheme_name="key", auto_error=False)
        self._check = check

    async def __call__(self, request: HTTPConnection) -> None:
        self._check(request.app.state.quire.keys, request)


require_client_key = KeyRequired(Keys.check_client)
require_admin_key = KeyRequired(Keys.check_admin)
require_debug_key = KeyRequired(Keys.check_debug)
