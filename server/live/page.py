"""The page at / with a playground and a live view. It loads nothing from elsewhere.

The page needs no key, since it knows nothing by itself: its scripts ask for the key and send it
with each request of their own.
"""

from __future__ import annotations

import hashlib
from functools import cache
from html import escape
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""Content types of the page's files, by the end of their names."""
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SAFETY = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Headers of the page and its files."""


@cache
def _assets() -> dict[str, bytes]:
    """Return the files that the page loads, by name."""
    folder = files("quire.server.web")
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.name[path.name.rfind(".") :] in _TYPES
    }


@cache
def assets_version() -> str:
    """Return a digest of all files. It is part of their addresses, so that each may be cached for
    ever."""
    digest = hashlib.sha256()
    for name, data in _assets().items():
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()[:16]


@cache
def _page(base: str) -> bytes:
    """Return the page, for a server whose paths begin with `base`."""
    text = files("quire.server.web").joinpath("index.html").read_text("utf-8")
    base = f"/{base}/" if base else "/"
    return text.replace("{base}", escape(base)).replace("{version}", assets_version()).encode()


@router.get("/")
async def page(request: Request) -> Response:
    """Return the page. It is cached only to be asked for again, since it names the version."""
    content = _page(request.app.state.quire.settings.root_path.strip("/"))
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**SAFETY, "cache-control": "no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type="text/html")


@router.get("/web/{version}/{name}")
async def asset(request: Request, version: str, name: str) -> Response:
    """Return a file of the page. Raises a 404 for one of another version."""
    content = _assets().get(name)
    if content is None or version != assets_version():
        raise HTTPException(404, "the page has no such file in this version")
    headers = {**SAFETY, "cache-control": "public, max-age=31536000, immutable"}
    return Response(content, headers=headers, media_type=_TYPES[name[name.rfind(".") :]])
