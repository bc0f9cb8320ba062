"""Compressed request bodies: decoded, bounded, refused."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from ..conftest import MakeClient
from ..openai_http import COMPLETIONS, PROMPT, assert_error


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:10]) + gzip.compress(data[10:])


def in_parts(data: bytes) -> AsyncIterator[bytes]:
    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 7):
            yield data[start : start + 7]

    return parts()


BODY = json.dumps({**PROMPT, "prompt": "compressed", "echo": True, "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", two_members),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_compressed_bodies_are_read(
    client: httpx.AsyncClient, coding: str, encode: Callable[[bytes], bytes], whole: bool
) -> None:
    data = encode(BODY)
    headers = {"content-encoding": coding, "content-type": "application/json"}
    response = await client.post(
        COMPLETIONS, content=data if whole else in_parts(data), headers=headers
    )
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"].startswith("compressed")


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "snappy\n"])
async def test_other_codings_are_refused_by_name(client: httpx.AsyncClient, coding: str) -> None:
    headers = {"content-encoding": coding.strip(), "content-type": "application/json"}
    response = await client.post(COMPLETIONS, content=b"x", headers=headers)
    assert_error(response, 415, "unsupported_media_type", None)
    assert response.headers["accept-encoding"] == "gzip, deflate"
    assert coding.strip() in response.json()["error"]["message"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_bomb_is_cheap_and_refused(make_client: MakeClient, coding: str) -> None:
    client = make_client(max_body_bytes=1 << 20)
    compressor = zlib.compressobj(9, wbits=31 if coding == "gzip" else 15)
    # After a full flush the same bytes are compressed to the same.
    first, other = (
        compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    bomb = first + 499 * other
    assert len(bomb) < 1 << 20
    headers = {"content-encoding": coding, "content-type": "application/json"}
    began = time.process_time()
    response = await client.post(COMPLETIONS, content=bomb, headers=headers)
    assert_error(response, 413, "body_too_large", None)
    assert time.process_time() - began < 0.2  # all of it would take a second


async def test_the_limit_holds_for_both_sizes(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=len(BODY))
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert len(gzip.compress(BODY)) <= len(BODY) + 20
    for body, status in ((BODY, 200), (BODY + b" ", 413)):
        data = zlib.compress(body)
        response = await client.post(
            COMPLETIONS, content=data, headers={**headers, "content-encoding": "deflate"}
        )
        assert response.status_code == status


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", BODY),
        ("gzip", gzip.compress(BODY, mtime=0)[:-3]),
        ("gzip", gzip.compress(BODY, mtime=0) + b"trailer"),
        ("gzip", b""),
        ("gzip", gzip.compress(b"", mtime=0) * 200 + gzip.compress(BODY, mtime=0)),
        ("deflate", b"\xff\xff\xff"),
        ("deflate", zlib.compress(BODY)[:-2]),
        ("deflate", zlib.compress(BODY) + b"trailer"),
    ],
)
async def test_bytes_that_are_not_of_the_coding_are_refused(
    client: httpx.AsyncClient, coding: str, data: bytes
) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    response = await client.post(COMPLETIONS, content=data, headers=headers)
    assert_error(response, 400, "invalid_value", None)
    assert coding in response.json()["error"]["message"]
