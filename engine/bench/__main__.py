"""The engine alone, timed in process: `throughput` of many requests, `latency` of one batch.

    python -P -m quire.engine.bench throughput --model DIR --load-format dummy

needs neither HTTP nor messaging packages, so that it runs on a bare GPU box; `quire bench` calls
it too. Prompts are random token ids and outputs have fixed lengths, whatever the model says.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from ..config import Device, DType, EngineConfig, KVCacheDType, LoadFormat, Quantization
from ..core.engine_core import EngineCore
from ..errors import ConfigurationError, QuireError
from .workload import RunResult, Workload, run_workload, uniform_lengths, write_profile


def run_throughput(arguments: argparse.Namespace) -> int:
    """`bench throughput`: warm up, time, and once more under the profiler where asked for."""
    _check_range_ratio(arguments.random_range_ratio)
    check_writable(arguments.profile, arguments.output_json)
    core = _make_core(arguments)
    lengths = uniform_lengths(
        arguments.num_prompts,
        arguments.input_len,
        arguments.output_len,
        arguments.random_range_ratio,
        arguments.seed,
    )
    workload = _workload(arguments, lengths)
    # Few tokens, yet as many rows as the run will have: every batch size is met once.
    warmup = Workload(
        tuple((min(prompt, 32), min(output, 8)) for prompt, output in lengths),
        workload.n,
        workload.temperature,
        workload.seed - 1,
    )
    run_workload(core, warmup)
    core.reset_prefix_cache()
    result = run_workload(core, workload)
    _print_result(core, result)
    if arguments.profile is not None:
        core.reset_prefix_cache()
        profile = cProfile.Profile()
        profile.enable()
        try:
            profiled = run_workload(core, workload)
        finally:
            profile.disable()
        write_profile(profile, profiled, arguments.profile)
        print(f"profile of a second run: {arguments.profile}")
    _save(arguments, core, asdict(result))
    return 0


def run_latency(arguments: argparse.Namespace) -> int:
    """`bench latency`: one batch again and again, each time with other prompts."""
    check_writable(arguments.output_json)
    core = _make_core(arguments)
    lengths = ((arguments.input_len, arguments.output_len),) * arguments.batch_size
    results = []
    for repetition in range(arguments.num_iters_warmup + arguments.num_iters):
        workload = _workload(arguments, lengths, seed_offset=repetition * arguments.batch_size)
        core.reset_prefix_cache()
        result = run_workload(core, workload)
        if repetition >= arguments.num_iters_warmup:
            results.append(result)
    seconds = sorted(result.elapsed_s for result in results)
    median = statistics.median(seconds)
    summary = {
        "latency_s_median": median,
        "latency_s_min": seconds[0],
        "latency_s_max": seconds[-1],
        "output_tokens_per_s": statistics.median(r.output_tokens_per_s for r in results),
        "step_ms_median": statistics.median(r.step_ms_median for r in results),
        "latencies_s": [result.elapsed_s for result in results],
    }
    _print_engine(core)
    print(
        f"batch of {arguments.batch_size}, {arguments.input_len} in, {arguments.output_len} out: "
        f"median {median * 1e3:.1f} ms (min {seconds[0] * 1e3:.1f}, max {seconds[-1] * 1e3:.1f}) "
        f"of {len(seconds)} repetitions\n"
        f"output tokens/s {summary['output_tokens_per_s']:.1f}, "
        f"median step {summary['step_ms_median']:.2f} ms"
    )
    _save(arguments, core, summary)
    return 0


def add_throughput_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """`model` is the default; without one the flag is required."""
    _add_engine_arguments(parser, model)
    _add_workload_arguments(parser, input_len=1024, output_len=128)
    parser.add_argument("--num-prompts", type=positive_int, default=256, help="requests")
    parser.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="lengths are uniform within this share around the given ones, 0 to below 1",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="write where a step's host time goes"
    )
    parser.set_defaults(run=run_throughput)


def add_latency_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """As `add_throughput_arguments`."""
    _add_engine_arguments(parser, model)
    _add_workload_arguments(parser, input_len=32, output_len=128)
    parser.add_argument("--batch-size", type=positive_int, default=8, help="requests in the batch")
    parser.add_argument("--num-iters", type=positive_int, default=10, help="timed repetitions")
    parser.add_argument("--num-iters-warmup", type=int, default=2, help="repetitions before")
    parser.set_defaults(run=run_latency)


def _add_engine_arguments(parser: argparse.ArgumentParser, model: str | None) -> None:
    engine = parser.add_argument_group("engine (as of `quire serve`)")
    engine.add_argument("--model", default=model, required=model is None, help="name or folder")
    engine.add_argument("--dtype", choices=get_args(DType), default="auto")
    engine.add_argument("--device", choices=get_args(Device), default="auto")
    engine.add_argument(
        "--load-format",
        choices=get_args(LoadFormat),
        default="auto",
        help="dummy fills the shape with random weights",
    )
    engine.add_argument("--max-model-len", type=positive_int)
    engine.add_argument("--quantization", choices=get_args(Quantization))
    engine.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDType), default="auto")
    engine.add_argument("--disable-cascade-attn", action="store_true")
    engine.add_argument("--block-size", type=positive_int, default=16)
    engine.add_argument("--num-gpu-blocks-override", type=positive_int)
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    engine.add_argument("--max-num-seqs", type=positive_int, default=256)
    engine.add_argument("--max-num-batched-tokens", type=positive_int)
    engine.add_argument("--num-threads", type=positive_int)
    engine.add_argument("--enforce-eager", action="store_true")
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )


def _add_workload_arguments(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int
) -> None:
    add = parser.add_argument
    add("--input-len", type=positive_int, default=input_len, help="prompt tokens")
    add("--output-len", type=positive_int, default=output_len, help="output tokens a choice")
    add("--n", type=positive_int, default=1, help="choices of each request")
    add("--temperature", type=float, help="default: 0, and 1 where n > 1")
    add("--seed", type=int, default=0)
    add("--output-json", type=Path, metavar="FILE", help="write the result here")


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def check_writable(*paths: Path | None) -> None:
    """Raises ConfigurationError before a run, rather than after it, where a result has no place."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigurationError(f"cannot write {path}: there is no such folder, or it is one")


def _check_range_ratio(ratio: float) -> None:
    if not 0.0 <= ratio < 1.0:
        raise ConfigurationError(f"--random-range-ratio must be from 0 to below 1, not {ratio}")


def _make_core(arguments: argparse.Namespace) -> EngineCore:
    # Not at the top: the command line is parsed, and refused, without the second torch takes.
    from ..runner.worker import Worker

    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        load_format=arguments.load_format,
        seed=arguments.seed,
        enforce_eager=arguments.enforce_eager,
        max_model_len=arguments.max_model_len,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        disable_cascade_attn=arguments.disable_cascade_attn,
        block_size=arguments.block_size,
        num_blocks=arguments.num_gpu_blocks_override,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enable_prefix_caching=arguments.enable_prefix_caching,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        num_threads=arguments.num_threads,
    )
    return EngineCore(config, Worker(config))


def _workload(
    arguments: argparse.Namespace, lengths: tuple[tuple[int, int], ...], seed_offset: int = 0
) -> Workload:
    temperature = arguments.temperature
    if temperature is None:
        temperature = 1.0 if arguments.n > 1 else 0.0
    return Workload(lengths, arguments.n, temperature, arguments.seed + seed_offset)


def _print_engine(core: EngineCore) -> None:
    info = core.info
    print(
        f"{info.architecture} on {info.device}, {info.dtype}, {info.num_parameters / 1e6:.1f} M "
        f"parameters, {info.num_blocks} blocks of {info.block_size} tokens"
    )


def _print_result(core: EngineCore, result: RunResult) -> None:
    _print_engine(core)
    print(
        f"{result.num_requests} requests, {result.prompt_tokens} prompt tokens "
        f"({result.cached_tokens} cached), {result.output_tokens} output tokens in "
        f"{result.elapsed_s:.2f} s\n"
        f"requests/s {result.requests_per_s:.2f}, output tokens/s "
        f"{result.output_tokens_per_s:.1f}, total tokens/s {result.total_tokens_per_s:.1f}\n"
        f"{result.num_steps} steps, median {result.step_ms_median:.2f} ms, p99 "
        f"{result.step_ms_p99:.2f} ms; {result.preemptions} preemptions, KV cache at most "
        f"{result.peak_kv_usage:.0%} used"
    )


def _save(arguments: argparse.Namespace, core: EngineCore, result: dict[str, Any]) -> None:
    if arguments.output_json is None:
        return
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if not callable(value)
    }
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": _versions(),
        "options": options,
        "engine": asdict(core.info),
        "result": result,
    }
    arguments.output_json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """A source tree on the path, as on a bare GPU box, has no version of its own."""
    found = {"python": platform.python_version()}
    for name in ("quire", "torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(argv: list[str] | None = None) -> int:
    """0 after a run, 1 where it failed, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="quire.engine.bench", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_throughput_arguments(commands.add_parser("throughput", help="many requests at once"))
    add_latency_arguments(commands.add_parser("latency", help="one batch, repeated"))
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
