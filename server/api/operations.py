"""The endpoints for operators and tools: health, metrics, version, models, admin calls."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ...engine.errors import ModelNotFoundError, ShuttingDownError
from ...engine.lora import AdapterSource
from ..http.auth import require_admin_key, require_client_key, require_debug_key
from ..http.route_docs import INTEGER, STRING, answers, errors, json_object
from ..requests.state import ServerState, state_of
from ..setting_types import SECRETS

public = APIRouter(tags=["operations"])
router = APIRouter(
    tags=["models"], dependencies=[Depends(require_client_key)], responses=errors(401)
)

_STATUS = json_object("status", status=STRING)
_LIVE = json_object("status", "reason", status=STRING, reason=STRING)


@public.post("/ping", response_model=None, responses={**answers(_STATUS), **errors(503)})
@public.get("/ping", response_model=None, responses={**answers(_STATUS), **errors(503)})
@public.get("/ready", response_model=None, responses={**answers(_STATUS), **errors(503)})
@public.get("/health", response_model=None, responses={**answers(_STATUS), **errors(503)})
async def health(request: Request) -> Response:
    """Readiness: 200 while the model serves, 503 while it loads, restarts, hangs or drains."""
    state = state_of(request)
    if state.draining:
        raise ShuttingDownError("the server is shutting down", state.settings.shutdown_timeout)
    state.check_ready()
    answer: dict[str, Any] = {"status": "ok"}
    if engines := state.engine.engines():
        answer["engines"] = {name: one.health.reason for name, one in engines.items()}
    return JSONResponse(answer)


@public.get(
    "/live",
    response_model=None,
    responses={
        **answers(_LIVE),
        503: {**answers(_LIVE)[200], "description": "The engine makes no progress"},
    },
)
async def live(request: Request) -> Response:
    """Liveness: 200 while the engine makes progress, also while it loads, restarts or drains."""
    engine = state_of(request).engine.health()
    answer = {"status": "ok" if engine.alive else "failing", "reason": engine.reason}
    return JSONResponse(answer, 200 if engine.alive else 503)


@public.get("/load", responses=answers(json_object("server_load", server_load=INTEGER)))
async def load(request: Request) -> dict[str, int]:
    """Return the number of choices that clients of this server wait for, as vLLM names it."""
    in_flight = state_of(request).in_flight
    return {"server_load": in_flight.num_queued + in_flight.num_running}


@public.get(
    "/metrics",
    response_model=None,
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": STRING}}}},
)
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format, or in that of OpenMetrics to clients that
    accept it."""
    openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
    content, media_type = await state_of(request).render_metrics(openmetrics)
    return Response(content, media_type=media_type)


@public.get("/version")
async def version(request: Request) -> dict[str, str]:
    """Return the version of quire."""
    return {"version": state_of(request).version}


def _card(state: ServerState, name: str, adapter: AdapterSource | None) -> dict[str, Any]:
    info = state.engine_info
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "quire",
        "root": (state.settings.model or name) if adapter is None else adapter.path,
        "parent": None if adapter is None else state.settings.served_names[0],
        "max_model_len": None if info is None else info.max_model_len,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the served model under each of its names, and its LoRA adapters, as far as the key may
    use them."""
    state = state_of(request)
    adapters = state.adapters
    names = filter(state.may_use, [*state.settings.served_names, *adapters])
    cards = [_card(state, name, adapters.get(name)) for name in names]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}", responses=errors(404))
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """Describe the model or the LoRA adapter that is served under this name."""
    state = state_of(request)
    adapter = state.adapters.get(name)
    known = adapter is not None or name in state.settings.served_names
    if not (known and state.may_use(name)):
        raise ModelNotFoundError(f"the model {ascii(name[:128])} is not served here", "model")
    return _card(state, name, adapter)


@public.post(
    "/v1/prefix_cache/reset",
    dependencies=[Depends(require_admin_key)],
    responses=errors(401, 503),
)
async def reset_prefix_cache(request: Request) -> dict[str, str]:
    """Forget every cached block that no sequence holds. Needs the admin key."""
    state = state_of(request)
    state.check_ready()
    await state.engine.reset_prefix_cache()
    return {"status": "ok"}


@public.get("/server_info", dependencies=[Depends(require_debug_key)], responses=errors(401))
async def server_info(request: Request) -> dict[str, Any]:
    """Return the settings without keys, the loaded model's facts and the versions."""
    state = state_of(request)
    info = state.engine_info
    packages = ("torch", "transformers", "fastapi", "uvicorn")
    return {
        "version": state.version,
        "settings": state.settings.model_dump(mode="json", exclude=set(SECRETS)),
        "engine": None if info is None else asdict(info),
        "system_env": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: package_version(name) for name in packages},
        },
    }


def _weights(state: ServerState) -> dict[str, Any] | None:
    """Return the formats and the size of the weights; None before the first start."""
    info = state.engine_info
    if info is None:
        return None
    return {
        "source_format": info.source_format,
        "computed_format": info.computed_format,
        "num_parameters": info.num_parameters,
        "num_bytes": info.weight_bytes,
    }


def _draft_model(state: ServerState) -> dict[str, Any] | None:
    """Return the draft model's size, in bytes; None without one, or before the first start."""
    info, model = state.engine_info, state.settings.engine_config().speculative_model
    if info is None or model is None:
        return None
    return {
        "model": model,
        "num_bytes": info.draft_weight_bytes,
        "kv_cache_bytes": info.draft_kv_bytes_per_token * info.kv_capacity_tokens,
    }


@public.get("/debug/engine", dependencies=[Depends(require_debug_key)], responses=errors(401))
async def debug_engine(request: Request) -> dict[str, Any]:
    """Return the engine's latest counters, its health, the counters of the queue limits, and what
    the weights and the draft model are."""
    state = state_of(request)
    stats, in_flight = state.engine.stats(), state.in_flight
    return {
        "weights": _weights(state),
        "draft_model": _draft_model(state),
        "stats": None if stats is None else {**stats.fields(), "kv_usage": stats.kv_usage},
        "health": state.engine.health()._asdict(),
        "engines": {
            name: {
                "health": one.health._asdict(),
                "stats": None if one.stats is None else one.stats.fields(),
            }
            for name, one in state.engine.engines().items()
        },
        "admission": {
            "num_queued": in_flight.num_queued,
            "num_running": in_flight.num_running,
            "queued_tokens": in_flight.queued_tokens,
            "draining": in_flight.draining,
        },
    }
