"""The OpenAPI document: FastAPI's, completed by the schemas of bodies and errors, and by examples.

Each route documents itself in its decorator; see http/route_docs.py.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from ..http.route_docs import schemas_by_name
from .examples import example_of


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the whole document of `app`."""
    document = copy.deepcopy(app.openapi())
    document["components"]["schemas"] = schemas_by_name()
    model = app.state.quire.settings.served_names[0]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # FastAPI adds its own 422 for invalid parameters; this server answers 400.
            operation["responses"].pop("422", None)
            operation["responses"] = dict(sorted(operation["responses"].items()))
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                schema = _first_schema(content["schema"], document["components"]["schemas"])
                example = example_of(path, schema, model)
                content |= {} if example is None else {"example": example}
    return document


def _first_schema(schema: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema that a reference means; of several, the first."""
    first = schema.get("anyOf", [schema])[0]
    found: dict[str, Any] = known.get(str(first.get("$ref", "")).rsplit("/", 1)[-1], first)
    return found
