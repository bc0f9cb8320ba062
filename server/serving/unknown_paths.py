"""Answers to paths that do not exist, with the path that was probably meant, and to wrong methods,
with those that are allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ..errors import http_error_response

_LONGEST = 128
"""Characters of a path that an answer repeats and compares."""


def explain_unknown_paths(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Make `app`, whose routes are those of `routers`, explain each 404 and 405 of its own."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    paths = sorted({route.path for route in routes if "{" not in route.path})

    async def on_unknown_path(request: Request, error: Exception) -> JSONResponse:
        if "endpoint" in request.scope:  # the path exists, and what it names does not
            assert isinstance(error, HTTPException)
            return http_error_response(404, str(error.detail), request.scope)
        root = request.scope.get("root_path", "")
        path = request.scope["path"].removeprefix(root)[:_LONGEST]
        meant = _meant(path, paths)
        hint = "/docs lists all endpoints" if meant is None else f"did you mean {root}{meant}?"
        return http_error_response(404, f"there is no {ascii(path)}; {hint}", request.scope)

    async def on_wrong_method(request: Request, error: Exception) -> JSONResponse:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        allowed: set[str] = set()
        for route in routes:
            if route.path_regex.match(path):
                allowed |= route.methods or set()
        if "GET" in allowed:
            allowed.add("HEAD")
        names = ", ".join(sorted(allowed))
        message = f"{ascii(request.method[:16])} is not allowed here, only {names}"
        response = http_error_response(405, message, request.scope)
        response.headers["allow"] = names
        return response

    app.add_exception_handler(404, on_unknown_path)
    app.add_exception_handler(405, on_wrong_method)


def _meant(path: str, paths: list[str]) -> str | None:
    """Return the path that is most like `path`, or None if none is.

    The usual mistakes are a missing or a doubled /v1 or slash, by a wrong base URL.
    """
    parts = [part for part in path.split("/") if part]
    while parts and parts[0] == "v1":
        del parts[0]
    for known in ("/v1/" + "/".join(parts), "/" + "/".join(parts)):
        if parts and known in paths:
            return known
    return next(iter(difflib.get_close_matches(path, paths, 1, cutoff=0.75)), None)
