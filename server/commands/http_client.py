"""Requests to a server with OpenAI's API: lists of models, and chats and completions as streams."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ...engine.errors import StartupError

ANSWER_TIMEOUT = 600.0
"""Seconds without a byte after which an answer is given up. Servers send comments meanwhile."""


class RequestError(StartupError):
    """A server could not be reached, or refused a request. `status` is None without an answer."""

    code = "request_failed"

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Chunk(NamedTuple):
    """A part of an answer: text, reasoning, the reason of its end, and usage if it is known."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class Server(NamedTuple):
    """The address of a server, without /v1, and the key that it asks for."""

    url: str
    key: str | None = None

    def models(self, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Return the cards of the served models. Raises RequestError."""
        found = self._json("GET", "/v1/models", timeout=timeout)
        if not isinstance(found, dict) or not isinstance(found.get("data"), list):
            raise RequestError(f"{self.url} does not answer as a server of models does")
        return [card for card in found["data"] if isinstance(card, dict) and "id" in card]

    def chat(self, body: dict[str, Any]) -> Iterator[Chunk]:
        """Yield the parts of an answer to a chat. Closing the iterator stops the answer."""
        for event in self._events("/v1/chat/completions", body):
            choice = (event.get("choices") or [{}])[0]
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            text, reason = delta.get("content") or "", choice.get("finish_reason")
            yield Chunk(text, reasoning, reason, event.get("usage"))

    def complete(self, body: dict[str, Any]) -> Iterator[Chunk]:
        """Yield the parts of a text's continuation. Closing the iterator stops it."""
        for event in self._events("/v1/completions", body):
            choice = (event.get("choices") or [{}])[0]
            yield Chunk(
                choice.get("text") or "", "", choice.get("finish_reason"), event.get("usage")
            )

    def _connect(self, timeout: float) -> tuple[http.client.HTTPConnection, str]:
        """Return a connection that is not opened yet, and the prefix of all paths."""
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        return kind(parts.hostname or "", parts.port, timeout=timeout), parts.path

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
    ) -> http.client.HTTPResponse:
        """Send a request and return the answer's head. Raises RequestError, as for any refusal."""
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            text = response.read(65536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self.url} cannot be reached: {error}") from error
        raise RequestError(_refusal(response.status, text), response.status)

    def _json(self, method: str, path: str, *, timeout: float) -> Any:
        connection, prefix = self._connect(timeout)
        with closing(connection):
            response = self._send(connection, method, prefix + path)
            try:
                return json.loads(response.read())
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise RequestError(f"{self.url} does not answer with JSON: {error}") from error

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream, and raise RequestError for one that tells an error."""
        connection, prefix = self._connect(ANSWER_TIMEOUT)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with closing(connection):
            response = self._send(connection, "POST", prefix + path, {**body, **options})
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if event.get("error"):
                        raise RequestError(str(event["error"].get("message", event["error"])))
                    yield event
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise RequestError(f"the answer broke off: {error or 'no data'}") from error
            raise RequestError("the answer broke off before its end")


def server_at(address: str, key: str | None = None) -> Server:
    """Return the server at a URL, which may end with /v1. Raises RequestError if it is none."""
    try:
        parts = urlsplit(address)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise RequestError(f"{address} is no address, such as http://127.0.0.1:8000")
    url = address.rstrip("/").removesuffix("/v1").rstrip("/")
    return Server(url, key)


def key_of_environment() -> str | None:
    """Return the first key of QUIRE_API_KEY, or None."""
    keys = os.environ.get("QUIRE_API_KEY", "").split(",")
    return keys[0].strip() or None


def _refusal(status: int, text: str) -> str:
    """Return a refusal's own message, or its status."""
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(text.split())[:200]
    if status == 401:
        return f"{message}: give it with --api-key or as QUIRE_API_KEY"
    return message or f"the server answered {status}"
