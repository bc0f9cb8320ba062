"""The OpenAPI document: FastAPI's, with the schemas of bodies that the routes read themselves.

Each route documents itself in its decorator; see http/route_docs.py.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from ..http.route_docs import body_schemas


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the whole document of `app`."""
    document = copy.deepcopy(app.openapi())
    schemas = document["components"]["schemas"] | body_schemas()
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    for operations in document["paths"].values():
        for operation in operations.values():
            # FastAPI adds its own 422 for invalid parameters; this server answers 400.
            operation["responses"].pop("422", None)
            operation["responses"] = dict(sorted(operation["responses"].items()))
    return document
