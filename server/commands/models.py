"""`quire models`: what is known of models before they are loaded, and what fits into a memory."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from ...engine.config import DType, EngineConfig
from ...engine.errors import StartupError
from ...engine.main_memory import available_memory

if TYPE_CHECKING:
    from ...engine.model.outline import ModelOutline

USABLE_SHARE = 0.9
"""Share of a memory that weights and KV cache may take; the rest is for activations."""
_CONTEXTS = (2048, 8192, 32768, 131072)
"""Context lengths for which it is shown how many sequences fit, beside the model's own."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser(
        "models",
        help="describe models without loading them",
        description="Show the architecture, the size and the KV cache of models, what of them fits "
        "into a memory, and why they would be refused. Nothing is loaded; of a model on the hub "
        "only the configuration is fetched. Without MODEL: the models that are known by name and "
        "those in the local cache of the hub.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="Name, folder or GGUF file.")
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="Such as 24GiB. Default: this machine's.",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="Device that would run them. (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="Data type of the weights. (default: auto)",
    )
    parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file in a folder or repository.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="Build the models without weights, which shows more reasons for a refusal; this "
        "imports torch.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(arguments: argparse.Namespace) -> int:
    """Print what is known of the models; return 1 if one of those asked for would be refused."""
    from ...engine.checkpoints.hub import cached_models
    from ...engine.checkpoints.source import PACKAGED_MODELS

    names = arguments.models or [*PACKAGED_MODELS, *cached_models()]
    # Before transformers is imported, so that a hub out of reach is asked only once.
    missing = {name: reason for name in names if (reason := _missing(name, arguments.gguf_file))}
    if not arguments.check:
        from ..text.torch_free import import_transformers

        import_transformers()
    from ...engine.model.outline import ModelOutline, outline

    gpu_memory = None if arguments.device == "cpu" else _gpu_memory()
    is_gpu = arguments.device == "cuda" or gpu_memory is not None
    dtype: DType = "float32" if arguments.dtype == "auto" and not is_gpu else arguments.dtype
    memory = arguments.memory or (gpu_memory if is_gpu else available_memory())
    configs = [
        EngineConfig(model=name, dtype=dtype, gguf_file=arguments.gguf_file) for name in names
    ]
    # As the CPU keeps K and V by default, of models that bear it.
    kv_dtype = "float16" if arguments.dtype == "auto" and not is_gpu else None
    found = [
        ModelOutline(model=config.model, dtype=dtype, refused=missing[config.model])
        if config.model in missing
        else outline(config, keeps_groups=not is_gpu, kv_dtype=kv_dtype)
        for config in configs
    ]
    if arguments.check:
        found = [_checked(item, config) for item, config in zip(found, configs, strict=True)]
    if arguments.json:
        print(json.dumps([_as_json(item, memory) for item in found], indent=2))
    else:
        print(_table(found, memory))
    return int(bool(arguments.models) and any(item.refused for item in found))


def _missing(name: str, gguf_file: str | None) -> str | None:
    """Return why a model's files are not there, within seconds; None if they are."""
    from ...engine.checkpoints.source import check_source, find_source

    try:
        check_source(find_source(name, gguf_file))
    except StartupError as error:
        return error.message
    return None


def _checked(item: ModelOutline, config: EngineConfig) -> ModelOutline:
    """Return the outline with the reason of a refusal that building the model shows."""
    from ...engine.model.rehearse import rehearse_load

    if item.refused:
        return item
    try:
        rehearse_load(config)
    except StartupError as error:
        return replace(item, refused=error.message)
    return item


def _fits(item: ModelOutline, memory: int | None) -> dict[int, int] | None:
    """Return how many sequences fit by their context length; None if it is not known."""
    if memory is None or item.max_model_len is None:
        return None
    lengths = {length for length in _CONTEXTS if length < item.max_model_len}
    fits = {
        length: item.sequences(int(memory * USABLE_SHARE), length)
        for length in sorted(lengths | {item.max_model_len})
    }
    return {length: number for length, number in fits.items() if number is not None} or None


def _as_json(item: ModelOutline, memory: int | None) -> dict[str, Any]:
    tokens = None if memory is None else item.capacity(int(memory * USABLE_SHARE))
    return {
        **asdict(item),
        "memory_bytes": memory,
        "kv_capacity_tokens": None if tokens is None else max(tokens, 0),
        "sequences_by_context": _fits(item, memory),
    }


def _table(found: list[ModelOutline], memory: int | None) -> str:
    shown = "memory not known" if memory is None else f"fits {memory / 2**30:.1f} GiB"
    head = ("model", "architecture", "parameters", "format", "weights", "KV a token", "context")
    rows = [(*head, shown)]
    for item in found:
        rows.append(
            (
                item.model,
                item.architecture or "–",
                "–" if item.num_parameters is None else f"{item.num_parameters / 1e6:,.1f}M",
                item.source_format or "–",
                "–" if item.weight_bytes is None else f"{item.weight_bytes / 1e6:,.0f} MB",
                _kept(item),
                "–" if item.max_model_len is None else f"{item.max_model_len:,}",
                f"refused: {item.refused}" if item.refused else _sequences(item, memory),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def _kept(item: ModelOutline) -> str:
    """Return in words what a token takes, and a sequence besides."""
    if item.kv_bytes_per_token is None:
        return "–"
    token = f"{item.kv_bytes_per_token:,} B"
    return f"{token} + {item.state_bytes / 1e6:,.1f} MB" if item.state_bytes else token


def _sequences(item: ModelOutline, memory: int | None) -> str:
    """Return in words how many sequences fit."""
    fits = _fits(item, memory)
    if fits is None:
        return "–"
    some = [f"{number:,} × {length:,}" for length, number in fits.items() if number]
    return ", ".join(some) or "does not fit"


def _size(text: str) -> int:
    """Read a size such as 24GiB."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a size, such as 24GiB") from error
    if size <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return size


def _gpu_memory() -> int | None:
    """Return the bytes of the first GPU's memory, by nvidia-smi; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    first = result.stdout.split()
    if result.returncode != 0 or not first or not first[0].isdecimal():
        return None
    return int(first[0]) * 2**20
