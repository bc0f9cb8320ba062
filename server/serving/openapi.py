"""The OpenAPI document: what FastAPI cannot know of endpoints that read their bodies themselves.

FastAPI contributes the paths, their parameters and docstrings. Here stand the request bodies (the
pydantic models that `protocol.validate` is called with), the answers, and the errors.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..api.embeddings import EmbeddingBody
from ..dialects.messages_body import CountTokensBody, MessagesBody
from ..dialects.responses_body import ResponseBody
from ..errors import ANTHROPIC_PATH
from ..requests.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
)

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/completions": (CompletionBody,),
    "/v1/chat/completions": (ChatBody,),
    "/v1/responses": (ResponseBody,),
    "/v1/messages": (MessagesBody,),
    "/v1/messages/count_tokens": (CountTokensBody,),
    "/v1/embeddings": (EmbeddingBody,),
    "/tokenize": (TokenizeBody, TokenizeChatBody),
    "/detokenize": (DetokenizeBody,),
}
"""Models of the bodies that a path takes."""
PUBLIC = {"/health", "/ready", "/metrics", "/version"}
"""Paths that ask for no key; see auth.py."""
SSE: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {  # of each event, not of the stream: OpenAPI 3.2's word, as FastAPI has it
            "type": "object",
            "required": ["data"],
            "properties": {name: {"type": "string"} for name in ("data", "event", "id")},
        }
    }
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_REASONS = {
    400: "The body or a parameter is wrong; `param` names it",
    401: "The API key is missing or wrong",
    404: "No such model, stream or stored object",
    410: "No longer kept",
    413: "The body is too large",
    415: "The content is not JSON",
    429: "Too much waits; see Retry-After",
    500: "The engine failed at this request",
    503: "Starting, draining or overloaded; see Retry-After",
    504: "The request took longer than its timeout",
}
_EVERYWHERE = (500,)
_OF_BODIES = (400, 404, 413, 415, 503)
_OF_GENERATIONS = (429, 504)
_OF_PATHS: dict[str, tuple[int, ...]] = {
    "/ready": (503,),
    "/tokenizer_info": (503,),
    "/v1/models/{name}": (404,),
    "/v1/streams/{stream_id}": (400, 404, 410),
    "/v1/responses/{response_id}": (400, 404),
    "/v1/responses/{response_id}/cancel": (400, 404),
    "/v1/prefix_cache/reset": (503,),
    "/v1/embeddings": (429, 504),
}
_GENERATION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"choices": {"type": "array", "items": {"type": "object"}}},
}
_ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/completions": _GENERATION,
    "/v1/chat/completions": _GENERATION,
    "/v1/embeddings": {
        "type": "object",
        "required": ["object", "data", "model", "usage"],
        "properties": {"data": {"type": "array", "items": {"type": "object"}}},
    },
    "/tokenize": {
        "type": "object",
        "required": ["count", "max_model_len", "tokens", "token_strs"],
        "properties": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    },
    "/detokenize": {
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": {"type": "string"}},
    },
    "/v1/responses": {
        "type": "object",
        "required": ["id", "object", "status", "output", "usage"],
        "properties": {"output": {"type": "array", "items": {"type": "object"}}},
    },
    "/v1/messages": {
        "type": "object",
        "required": ["id", "type", "role", "content", "stop_reason", "usage"],
        "properties": {"content": {"type": "array", "items": {"type": "object"}}},
    },
    "/v1/messages/count_tokens": {
        "type": "object",
        "required": ["input_tokens"],
        "properties": {"input_tokens": {"type": "integer"}},
    },
}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The whole document of `app`."""
    document = copy.deepcopy(app.openapi())
    components = document.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schemas = {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    _, models = models_json_schema(
        [(model, "validation") for bodies in BODIES.values() for model in bodies],
        ref_template="#/components/schemas/{model}",
    )
    components["schemas"] = {**models.get("$defs", {}), **schemas}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe(path, operation)
    return document


def _describe(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own; ours are 400
    errors = {*_EVERYWHERE, *_OF_PATHS.get(path, ())}
    if path not in PUBLIC:
        operation["security"] = [{"key": []}]
        errors.add(401)
    if path in BODIES:
        errors.update(_OF_BODIES)
        models = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in BODIES[path]]
        body = models[0] if len(models) == 1 else {"anyOf": models}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
        answer = _ANSWERS.get(path, {"type": "object"})
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        if "stream" in BODIES[path][0].model_fields:
            errors.update(_OF_GENERATIONS)
            content |= SSE
        responses["200"]["content"] = content
    if path == "/v1/streams/{stream_id}" and "resume" in operation["operationId"]:
        operation["parameters"].append(
            {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}}
        )
        responses["200"]["content"] = SSE
        responses["204"] = {"description": "The client has seen the end"}
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path == "/health":
        responses["503"] = {**responses["200"], "description": "The engine makes no progress"}
    shape = "AnthropicError" if path.startswith(ANTHROPIC_PATH) else "Error"
    for status in sorted(errors):
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}},
        }
