"""The OpenAPI document: FastAPI's, completed by the schemas of bodies and errors, and by examples.

Each route documents itself in its decorator; see http/route_docs.py. An example runs as it is, if
the model can do what the path asks for.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from ..http.route_docs import schemas_by_name

_QUESTION = [{"role": "user", "content": "What is quire?"}]
_PAIRS = ["A block holds keys and values.", "The cat sat on the mat."]

EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _QUESTION, "max_tokens": 64},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 32},
    "/v1/responses": {"input": "What is quire?", "max_output_tokens": 64},
    "/v1/responses/input_tokens": {"input": "What is quire?"},
    "/v1/responses/compact": {"input": "What is quire?"},
    "/v1/messages": {"messages": _QUESTION, "max_tokens": 64},
    "/v1/messages/count_tokens": {"messages": _QUESTION},
    "/v1/conversations": {"metadata": {"topic": "trying it out"}},
    "/v1/conversations/{conversation_id}": {"metadata": {"topic": "trying it out"}},
    "/v1/conversations/{conversation_id}/items": {
        "items": [{"type": "message", "role": "user", "content": "What is quire?"}]
    },
    "/v1/embeddings": {"input": ["What is quire?", "What is a block?"]},
    "/tokenize": {"prompt": "What is quire?"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/rerank": {"query": "What is in a block?", "documents": _PAIRS},
    "/v1/score": {"text_1": "What is in a block?", "text_2": _PAIRS},
    "/v1/classify": {"input": _PAIRS},
    "/invocations": {"messages": _QUESTION, "max_tokens": 64},
    "/v1/load_lora_adapter": {"lora_name": "mine", "lora_path": "mine"},
    "/v1/unload_lora_adapter": {"lora_name": "mine"},
}
"""Without `model`, which the document adds if the body has it: a server has names of its own."""


def example_of(path: str, schema: dict[str, Any], model: str) -> dict[str, Any] | None:
    """Return the example of a path whose body has `schema`, for a server of `model`; None if it has
    none."""
    found = EXAMPLES.get(path)
    if found is None or "model" not in schema.get("properties", {}):
        return found
    return {"model": model, **found}


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
