"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with the shapes that vLLM gives them.

Both need the admin key. A path that comes over HTTP is a way to make the server read files, so only
folders below `--lora-dir` are read, and nothing that a symbolic link leads to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from ...engine.errors import InvalidRequestError, ModelNotFoundError
from ...engine.lora import AdapterSource, name_problem
from ..http.auth import require_admin_key
from ..http.body import read_json_object
from ..http.route_docs import BODY_ERRORS, STRING, errors, json_body
from ..requests.field_types import Fields
from ..requests.protocol import check_types
from ..requests.state import ServerState, state_of
from .answers import ignored_header

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of an adapter that are read."""

router = APIRouter(tags=["operations"], dependencies=[Depends(require_admin_key)])

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": STRING}}}}


class LoadBody(Fields):
    """The name and the folder of an adapter to load."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool | None = None


class UnloadBody(Fields):
    """The name of an adapter to unload."""

    lora_name: Annotated[str, Field(min_length=1)]


@router.post(
    "/v1/load_lora_adapter",
    response_model=None,
    response_class=PlainTextResponse,
    openapi_extra=json_body(LoadBody),
    responses={**_TEXT, **errors(401, *BODY_ERRORS)},
)
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Load a LoRA adapter from a folder below `--lora-dir`. Needs the admin key."""
    state = state_of(request)
    fields = await read_json_object(request)
    body, ignored = check_types(LoadBody, fields, strict=state.settings.strict)
    if (problem := name_problem(body.lora_name)) is not None:
        raise InvalidRequestError(problem, "lora_name")
    if body.lora_name in state.settings.served_names:
        raise InvalidRequestError(
            f"{body.lora_name[:128]!r} is the name of the model itself", "lora_name"
        )
    source = AdapterSource(body.lora_name, str(_allowed_folder(state, body.lora_path)))
    state.check_ready()
    await state.engine.load_adapter(source, replace=bool(body.load_inplace))
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' added successfully.",
        headers=ignored_header(ignored),
    )


@router.post(
    "/v1/unload_lora_adapter",
    response_model=None,
    response_class=PlainTextResponse,
    openapi_extra=json_body(UnloadBody),
    responses={**_TEXT, **errors(401, *BODY_ERRORS)},
)
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Unload a LoRA adapter: its requests finish, and new ones get 404. Needs the admin key."""
    state = state_of(request)
    fields = await read_json_object(request)
    body, ignored = check_types(UnloadBody, fields, strict=state.settings.strict)
    state.check_ready()
    if body.lora_name not in state.adapters:
        raise ModelNotFoundError(f"there is no adapter {ascii(body.lora_name[:128])}", "lora_name")
    await state.engine.unload_adapter(body.lora_name)
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' removed successfully.",
        headers=ignored_header(ignored),
    )


def _allowed_folder(state: ServerState, path: str) -> Path:
    """Return the folder that a client names, absolute, or relative to `--lora-dir`. Raises
    InvalidRequestError unless it is a folder below `--lora-dir` that no symbolic link leads to."""
    root = state.settings.lora_dir
    if root is None:
        raise InvalidRequestError(
            "adapters cannot be loaded while the server runs: start it with --lora-dir", "lora_path"
        )
    root, asked = root.absolute(), Path(path)
    if ".." in asked.parts or not path.isprintable():
        raise InvalidRequestError("lora_path must be a plain path, without ..", "lora_path")
    if asked.is_absolute() and not asked.is_relative_to(root):
        raise InvalidRequestError("lora_path must be below the folder of --lora-dir", "lora_path")
    folder = root / asked
    below = folder.relative_to(root).parts
    steps = [root.joinpath(*below[: count + 1]) for count in range(len(below))]
    try:
        if any(step.is_symlink() for step in (*steps, *(folder / name for name in FILES))):
            raise InvalidRequestError("lora_path must not lead through a link", "lora_path")
        is_folder = folder.is_dir()
    except OSError:  # such as a name that is too long
        is_folder = False
    if not is_folder:
        raise InvalidRequestError("lora_path is no folder below that of --lora-dir", "lora_path")
    return folder
