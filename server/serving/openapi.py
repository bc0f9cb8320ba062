"""The OpenAPI document: FastAPI's, completed by the schemas of bodies and errors.

Each route documents itself in its decorator; see http/route_docs.py.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from ..http.route_docs import schemas_by_name


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the whole document of `app`."""
    document = copy.deepcopy(app.openapi())
    document["components"]["schemas"] = schemas_by_name()
    for operations in document["paths"].values():
        for operation in operations.values():
            # FastAPI adds its own 422 for invalid parameters; this server answers 400.
            operation["responses"].pop("422", None)
            operation["responses"] = dict(sorted(operation["responses"].items()))
    return document
