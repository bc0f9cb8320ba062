"""The arguments of the engine's benchmarks.

Those of the engine are the flags of `quire serve`, made from the declarations in EngineConfig.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import EngineConfig, engine_flags
from ..errors import ConfigurationError
from ..flags.flag import EngineFlag

NOT_OFFERED = frozenset(
    {
        *("seed", "pooling", "max_logprobs", "kv_cache_memory_bytes", "kv_events_config"),
        *("nnodes", "node_rank", "master_addr", "master_port"),
    }
)
"""Fields of EngineConfig without a flag here. `--seed` is the workload's, and also goes to the
engine; several hosts are for `quire serve`; the size of the KV cache is given by
`--num-gpu-blocks-override`; the others do not change what is measured."""


def add_throughput_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """Add the arguments of `throughput`. Without a default `model`, `--model` is required."""
    _add_engine_arguments(parser, model)
    group = _add_workload_arguments(parser, input_len=1024, output_len=128)
    _add_number(group, "--num-prompts", 256, "Requests.")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="Lengths are uniform in length · (1 ± R), R from 0 to below 1. (default: 0)",
    )
    group.add_argument(
        "--profile", type=Path, metavar="FILE", help="Write where the host spends a step."
    )


def add_latency_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """Add the arguments of `latency`. Without a default `model`, `--model` is required."""
    _add_engine_arguments(parser, model)
    group = _add_workload_arguments(parser, input_len=32, output_len=128)
    _add_number(group, "--batch-size", 8, "Requests in the batch.")
    _add_number(group, "--num-iters", 10, "Timed repetitions.")
    _add_number(group, "--num-iters-warmup", 2, "Repetitions before those.", kind=int)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Return the configuration that the arguments ask for. Raises ConfigurationError."""
    values: dict[str, Any] = {flag.field: getattr(arguments, flag.name) for flag in _offered()}
    return EngineConfig(model=arguments.model, seed=arguments.seed, **values)


def _offered() -> list[EngineFlag]:
    return [flag for flag in engine_flags() if flag.field not in NOT_OFFERED]


def _add_engine_arguments(parser: argparse.ArgumentParser, model: str | None) -> None:
    group = parser.add_argument_group("Engine (as in `quire serve`)")
    text = "Hugging Face name or folder." + (" Default: the built-in demo model." if model else "")
    group.add_argument("--model", default=model, required=model is None, help=text)
    for flag in _offered():
        text = flag.help
        if flag.default is not None and flag.default is not False:
            text += f" (default: {'on' if flag.default is True else flag.default})"
        group.add_argument(
            "--" + flag.name.replace("_", "-"),
            default=flag.default,
            help=text.replace("%", "%%"),
            **reading(flag),
        )


def reading(flag: EngineFlag) -> dict[str, Any]:
    """Return argparse's keywords that say how to read the flag's value."""
    if flag.type in (bool, bool | None):
        return {"action": argparse.BooleanOptionalAction}
    if flag.choices:
        return {"choices": flag.choices}

    def number(text: str) -> Any:
        value = flag.value_type(text)
        try:
            flag.check(value)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(f"{error.message}, not {text}") from error
        return value

    return {"type": number, "metavar": "N"}


def _add_workload_arguments(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("Workload")
    _add_number(group, "--input-len", input_len, "Prompt tokens.")
    _add_number(group, "--output-len", output_len, "Output tokens of each choice.")
    _add_number(group, "--n", 1, "Choices per request.")
    group.add_argument("--temperature", type=float, metavar="T", help="Default: 0, or 1 if n > 1.")
    _add_number(group, "--seed", 0, "Seed of prompts and sampling.", kind=int)
    group.add_argument(
        "--output-json", type=Path, metavar="FILE", help="Write the result to this file."
    )
    return group


def _add_number(
    group: argparse._ArgumentGroup,
    flag: str,
    default: int,
    help: str,
    kind: Callable[[str], int] | None = None,
) -> None:
    text = f"{help} (default: {default})"
    group.add_argument(flag, type=kind or positive_int, default=default, metavar="N", help=text)


def positive_int(text: str) -> int:
    """Read an integer of at least 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def check_writable(*paths: Path | None) -> None:
    """Raise ConfigurationError if a result cannot be written, before the run that makes it."""
    for path in paths:
        if path is not None and path.is_dir():
            raise ConfigurationError(f"cannot write {path}: it is a folder")
        if path is not None and not path.parent.is_dir():
            raise ConfigurationError(f"cannot write {path}: its folder does not exist")
