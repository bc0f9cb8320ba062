"""The rows of docs/faults.md that a client can cause, sent over HTTP to a real server with a model.

For each row: the answer; beside it a greedy answer, whose text must be what it is alone; and after
it an empty pool and queue. The other rows (starts, engines and workers that die, adapters, failures
inside the engine) have the tests that the table names, and the simulation and the soak cause them
together.
"""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from .documents import ROOT, tables
from .test_end_to_end import Server

C, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
JSON_TYPE = {"content-type": "application/json"}
BLOCKS = 40
BODY_BYTES = 6 * 2**20


class Ask(NamedTuple):
    """A request, and the status that its answer must have; 0 means a closed connection."""

    status: int
    body: Any
    path: str = C
    headers: dict[str, str] = JSON_TYPE
    method: str = "POST"


def _fields(status: int = 400, path: str = C, **fields: Any) -> Ask:
    base = {"prompt": "hi", "max_tokens": 2} if path == C else {**HI, "max_tokens": 2}
    return Ask(status, base | fields, path)


def _raw(status: int, body: bytes, **headers: str) -> Ask:
    return Ask(
        status, body, headers=JSON_TYPE | {k.replace("_", "-"): v for k, v in headers.items()}
    )


_TOOL = {"type": "function", "function": {"name": "f"}}
ROWS: dict[str, list[Ask]] = {
    "more than 100 headers": [Ask(431, {}, headers={f"x-{i}": "a" for i in range(101)})],
    "an unknown route or method": [Ask(404, {}, "/v1/nothing"), Ask(405, None, method="GET")],
    "a content type other than JSON": [Ask(415, b"{}", headers={"content-type": "text/plain"})],
    "a key that is missing, wrong, empty or 1 MB long; a forged Host header": [
        Ask(401, None, "/debug/engine", headers, "GET")
        for headers in (
            {}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer x", "host": "docs"},
        )
    ],
    "an `x-request-id` with control characters or spaces, or of 1 MB": [
        _raw(200, b'{"prompt": "a", "max_tokens": 1}', x_request_id="a b")
    ],
    "two requests with the same `x-request-id`": [
        _raw(200, b'{"prompt": "a", "max_tokens": 1}', x_request_id="same")
    ] * 2,
    "a model name or a path that imitates metric labels": [
        _fields(404, model='x"} 1\n'), Ask(404, {}, "/v1/a%22%7D"),
    ],
    "a body over `--max-body-bytes`, announced or chunked": [_raw(413, b" " * (BODY_BYTES + 1))],
    "a compressed body that is larger than `--max-body-bytes` once decoded, such as a bomb": [
        _raw(413, gzip.compress(b" " * (BODY_BYTES + 1)), content_encoding="gzip")
    ],
    "a content coding other than gzip and deflate, or bytes that are not of it": [
        _raw(415, b"{}", content_encoding="br"), _raw(400, b"no", content_encoding="gzip"),
    ],
    "invalid JSON, `NaN`, `1e999`, an integer of 5,000 digits, anything but UTF-8": [
        _raw(400, b'{"prompt": '), _raw(400, b'{"prompt": "a", "temperature": NaN}'),
        _raw(400, b'{"prompt": "a", "temperature": 1e999}'),
        _raw(400, b'{"prompt": [' + b"9" * 5000 + b"]}"), _raw(400, b'{"prompt": "\xe9"}'),
    ],
    "JSON nested 100,000 deep, or a million values": [
        _raw(400, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        _raw(400, b'{"prompt": [' + b"1," * 1_000_000 + b"1]}"),
    ],
    "a body that is a list, null or a string": [
        _raw(400, b"[]"), _raw(400, b"null"), _raw(400, b'"x"'),
    ],
    "duplicate keys, a lone surrogate": [
        _raw(400, b'{"prompt": "a", "prompt": "b"}'), _raw(400, b'{"prompt": "a\\ud800"}'),
    ],
    "a NUL in a prompt": [_fields(200, prompt="a\0b")],
    "a field that nobody knows": [_fields(200, nobody_knows=1)],
    "a known field that is not supported": [_fields(400, suffix="x", prompt=["a", "b"], best_of=0)],
    "a model that is not served": [_fields(404, model="other"), _fields(404, CHAT, model="other")],
    "`n` or `best_of` 0, -1 or a billion; `n` times prompts over the limit": [
        _fields(n=0), _fields(n=-1), _fields(n=10**9), _fields(best_of=0),
        _fields(n=100, prompt=["a"] * 100),
    ],
    "booleans, strings and fractions in place of integers": [
        _fields(n=True), _fields(max_tokens="3"), _fields(max_tokens=1.5),
    ],
    "`temperature`, `top_p`, `top_k`, `min_p` and penalties out of their ranges": [
        _fields(temperature=-1), _fields(top_p=0), _fields(top_k=-5), _fields(min_p=2),
        _fields(presence_penalty=3), _fields(repetition_penalty=0), _fields(200, temperature=1e-8),
    ],
    "`max_tokens` 0, -1 or 2⁶³; `min_tokens` above it": [
        _fields(max_tokens=-1), _fields(max_tokens=2**63), _fields(min_tokens=9),
    ],
    "a prompt, or a prompt and an explicit `max_tokens`, over the context": [
        _fields(prompt="a b " * 4000), _fields(max_tokens=100_000),
    ],
    "a request that could never fit the KV cache": [
        _fields(use_beam_search=True, temperature=0, n=4, max_tokens=16 * BLOCKS - 100)
    ],
    "`logprobs`, `top_logprobs`, `prompt_logprobs` below 0 or over the limit": [
        _fields(logprobs=-1), _fields(logprobs=10**9), _fields(prompt_logprobs=10**6),
        _fields(400, CHAT, logprobs=True, top_logprobs=21),
    ],
    "token ids outside the vocabulary, in prompts, stops, `logit_bias` or `logprob_token_ids`, "
    "of which there are at most 128": [
        _fields(prompt=[-1]), _fields(prompt=[2**63]), _fields(stop_token_ids=[10**8]),
        _fields(logit_bias={"100000000": 1}), _fields(logprob_token_ids=[10**8], logprobs=1),
    ],
    "a stop string that is empty, of 1 MB, or one of 17": [
        _fields(stop=""), _fields(stop="a" * 2**20), _fields(stop=["a"] * 17),
    ],
    "empty prompts and conversations; 10,000 prompts; 4,097 messages": [
        _fields(prompt=""), _fields(prompt=[]), _fields(400, CHAT, messages=[]),
        _fields(prompt=["a"] * 10_000), _fields(400, CHAT, messages=HI["messages"] * 4097),
    ],
    "5 MB of one letter": [_fields(prompt="a" * 5_000_000)],
    "a seed of 2⁶⁴": [_fields(seed=2**64)],
    "malformed tools; a `tool_choice` that names none of them": [
        _fields(400, CHAT, tools=[{"type": "function"}]),
        _fields(400, CHAT, tools=[_TOOL],
                tool_choice={"type": "function", "function": {"name": "g"}}),
    ],
    "several wrong fields at once": [_fields(n=0, temperature=9, top_p=7)],
    "a chat template in the request": [_fields(400, CHAT, chat_template="{{ messages }}")],
    "template variables that reach into the tokenizer": [
        _fields(400, CHAT, chat_template_kwargs={"tokenizer": 1})
    ],
    "images, by `file://` or by link-local addresses": [
        _fields(400, CHAT, messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}}]}])
        for url in ("file:///etc/passwd", "http://169.254.169.254/")
    ],
    "a schema with a remote `$ref`": [
        _fields(structured_outputs={"json": {"$ref": "http://127.0.0.1:9/x"}})
    ],
    "schemas, regular expressions and grammars that explode": [
        _fields(structured_outputs={"json": {"type": "integer", "multipleOf": 99999999}}),
    ],
    "a cache salt that is empty, a number, or of 1 MB": [
        _fields(cache_salt=""), _fields(cache_salt=1), _fields(cache_salt="a" * 2**20),
    ],
}  # fmt: skip
"""By the first cell of a row of docs/faults.md, what to send and the status of the answer."""


def _connection(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as link:
        link.sendall(data)
        answer = b""
        while part := link.recv(65536):
            answer += part
        return answer


def _large_head(port: int) -> None:
    try:
        answer = _connection(port, b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 100_000)
    except ConnectionError:
        return
    assert answer.startswith((b"", b"HTTP/1.1 400"))


def _not_http(port: int) -> None:
    assert _connection(port, b"\x16\x03\x01\x02 no http\r\n\r\n").startswith(b"HTTP/1.1 400")


def _leaves_in_its_body(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 20) as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b'content-length: 1000\r\n\r\n{"prompt": "a"'
        )


def _leaves_its_stream(port: int) -> None:
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{port}{C}"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        assert next(lines).startswith("data: ")


def _ends_its_side(port: int) -> None:
    body = b'{"prompt": "a", "max_tokens": 3}'
    with socket.create_connection(("127.0.0.1", port), 60) as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        link.shutdown(socket.SHUT_WR)
        answer = b""
        while part := link.recv(65536):
            answer += part
    assert b"HTTP/1.1 200" in answer and b'"finish_reason"' in answer


CONNECTIONS: dict[str, Callable[[int], None]] = {
    "headers over 64 KiB": _large_head,
    "bytes that are not HTTP": _not_http,
    "a client that leaves in the middle of its body": _leaves_in_its_body,
    "a client that leaves while its request waits, runs or streams": _leaves_its_stream,
    "a client that ends its side of the connection and waits": _ends_its_side,
}
"""The same for rows that are about the connection itself."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--num-gpu-blocks-override", str(BLOCKS), "--max-body-bytes", str(BODY_BYTES)]
    flags += ["--max-model-len", str(16 * BLOCKS), "--admin-api-key", "admin"]
    with Server(*flags) as server:
        server.http.headers["authorization"] = "Bearer admin"
        yield server


@pytest.fixture(scope="module")
def alone(server: Server) -> str:
    return server.greedy("The canary sings of blocks", 60)


@pytest.mark.parametrize("row", [*ROWS, *CONNECTIONS])
def test_a_row_is_answered_and_harms_nobody(row: str, server: Server, alone: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        canary = pool.submit(server.greedy, "The canary sings of blocks", 60)
        for ask in ROWS.get(row, ()):
            _check(server.address, ask)
        if row in CONNECTIONS:
            CONNECTIONS[row](int(server.address.rsplit(":", 1)[1]))
        assert canary.result() == alone
    server.wait_idle()


def _check(address: str, ask: Ask) -> None:
    body = ask.body if isinstance(ask.body, bytes | None) else json.dumps(ask.body).encode()
    answer = httpx.request(
        ask.method, address + ask.path, content=body, headers=JSON_TYPE | ask.headers, timeout=60
    )
    assert answer.status_code == ask.status, (ask.path, str(body)[:200], answer.text[:300])
    if ask.status >= 400:
        error = answer.json()["error"]
        assert error["message"] and error["type"] and "\n" not in error["message"]
    if "x-request-id" in ask.headers:
        assert (answer.headers["x-request-id"] == "same") == (ask.headers["x-request-id"] == "same")
    if b"nobody_knows" in (body or b""):
        assert answer.headers["x-quire-ignored-params"] == "nobody_knows"


def test_every_row_here_is_one_of_the_table() -> None:
    text = (ROOT / "docs/faults.md").read_text("utf-8")
    known = {row["input or fault"] for table in tables(text) for row in table}
    assert known >= ROWS.keys() | CONNECTIONS.keys(), (ROWS.keys() | CONNECTIONS.keys()) - known
