"""The headers that tell a client what its key has left: OpenAI's, or under Anthropic's API that
one's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import is_anthropic
from .caller import Caller
from .rates import Use

_OF_OPENAI, _OF_ANTHROPIC = "x-ratelimit-{what}-{kind}", "anthropic-ratelimit-{kind}-{what}"
_KINDS, _VALUES = ("requests", "tokens"), ("limit", "remaining", "reset")
NAMES = tuple(
    form.format(what=what, kind=kind)
    for form in (_OF_OPENAI, _OF_ANTHROPIC)
    for kind in _KINDS
    for what in _VALUES
)
"""All headers."""


class RateHeadersMiddleware:
    """Adds the headers to answers of requests that were counted for their key's limits, which the
    check of the key notes as `request.state.counted`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_rates(message: Message) -> None:
            if message["type"] == "http.response.start":
                caller: Caller | None = scope["state"].get("counted")
                if caller is not None:
                    headers = MutableHeaders(scope=message)
                    for name, value in rate_headers(caller, anthropic=is_anthropic(scope)):
                        headers[name] = value
            await send(message)

        await self.app(scope, receive, send_with_rates if scope["type"] == "http" else send)


def rate_headers(caller: Caller, *, anthropic: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the limits of the caller's key by the minute, what is left of them, and when they are
    whole again. Limits that are not set have no headers."""
    limits, slot, rates = caller.tenant.limits, caller.tenant.slot, caller.rates
    form = _OF_ANTHROPIC if anthropic else _OF_OPENAI
    for kind, limit, use in (
        ("requests", limits.requests_per_minute, rates.requests(slot)),
        ("tokens", limits.tokens_per_minute, rates.tokens(slot)),
    ):
        if limit is not None:
            values = (str(limit), str(use.left(limit)), _reset(use, anthropic))
            for what, value in zip(_VALUES, values, strict=True):
                yield form.format(what=what, kind=kind), value


def _reset(use: Use, anthropic: bool) -> str:
    """Return when the limit is whole again: a time by RFC 3339 for Anthropic's clients, and for
    OpenAI's the span until then, such as 1m2.5s."""
    seconds = use.reset()
    if anthropic:
        moment = datetime.fromtimestamp(math.ceil(time.time() + seconds), UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{rest:.3g}s" if minutes else f"{rest:.3g}s"
