"""`quire plan`: how many engines a load needs, by simulation."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...engine.bench.arguments import check_writable, positive_int, reading
from ...engine.config import EngineConfig, engine_flags
from ...engine.errors import ConfigurationError, QuireError, StartupError
from ...engine.layers.layer_groups import LayerGroups
from ...engine.plan.calibration import Calibration, load_calibration
from ...engine.plan.capacity import Bound
from ...engine.plan.front import Front, FrontSource, FrontTimes
from ...engine.plan.layout import Hardware, Layout, layouts_of
from ...engine.plan.planned_engine import EngineShape, MessageTimes
from ...engine.plan.planned_fleet import PlannedRequest
from ...engine.plan.roofline import GPUS, ModelShape, gpu_named
from ...engine.plan.serving import LARGE_STRETCH, fit_serving
from ..about import install_extra
from .arguments import add_request_arguments, check_arguments
from .dataset import arrival_times, build_workload, dataset_options
from .plan_report import (
    Plan,
    describe_calibration,
    make_plan,
    panels,
    render,
    to_json,
)
from .plot import write_panels

SIZES = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
"""Flags of the engine that a plan may set, beside the number of blocks."""
MEASURED_ONLY = (
    *("dtype", "device", "quantization", "kv_cache_dtype", "num_threads", "load_format"),
    *("enforce_eager", "gpu_memory_utilization", "async_scheduling", "gguf_file"),
)
"""Flags of the engine that only matter while it is measured."""
BLOCKS = "num_gpu_blocks_override"
BOUNDS = ("ttft-p50", "ttft-p99", "itl-p50", "itl-p99", "e2e-p50", "e2e-p99")
DEFAULT_FILE = Path("calibration.json")


def add_parser(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser(
        "plan",
        help="say how many engines a load needs",
        description="Simulate engines with the real scheduler, cache and router, and measured or "
        "estimated step times, and say which load they bear.",
        usage="quire plan [MODEL] [flags]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="name or folder; default: the demo model"
    )
    times = parser.add_argument_group("Step times").add_argument
    times(
        "--calibrate",
        action="store_true",
        help="measure them on this machine's device in two or three minutes, write --calibration",
    )
    times(
        "--http",
        action=argparse.BooleanOptionalAction,
        help="with --calibrate: start a server, too, and measure what it adds (default: on)",
    )
    times(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=f"measured step times (default with --calibrate: {DEFAULT_FILE})",
    )
    times("--gpu", metavar="NAME", help=f"estimate them for one of {', '.join(GPUS)}")
    _add_fleet_arguments(parser)
    goal = parser.add_argument_group("Goal").add_argument
    goal("--rate", type=float, metavar="R", help="requests/s that must be served")
    for bound in BOUNDS:
        goal(f"--{bound}", type=float, metavar="MS", help=f"bound on {bound.replace('-', ' ')}")
    engine = parser.add_argument_group("Engine").add_argument
    for flag in engine_flags():
        if flag.name in (*SIZES, *MEASURED_ONLY, BLOCKS):
            only = " (only with --calibrate)" if flag.name in MEASURED_ONLY else ""
            text = flag.help.replace("%", "%%") + only
            engine("--" + flag.name.replace("_", "-"), default=None, help=text, **reading(flag))
    add_request_arguments(parser, num_prompts=400)
    out = parser.add_argument_group("Results").add_argument
    out("--json", action="store_true", help="print the plan as JSON")
    out("--plot", type=Path, metavar="FILE", help="write a plot, as .html or .svg")
    # What the check of a benchmark's flags reads, and a plan has not.
    absent = {"sweep": None, "request_rate": None, "result_filename": None}
    parser.set_defaults(run=run_plan, endpoint="/v1/completions", **absent)


def _add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    fleet = parser.add_argument_group("Fleet").add_argument
    fleet("--gpus", type=positive_int, metavar="N", help="GPUs in all: plan each way to use them")
    fleet("--layout", action="append", metavar="TPxN", help="GPUs of an engine × engines, as 2x4")
    fleet("--http-workers", type=positive_int, default=1, metavar="N", help="HTTP processes")
    text = "clients share the cores of HTTP, as quire bench serve does on two cores"
    fleet("--with-client", action="store_true", help=text)
    text = "HTTP before the engine, for each request (default: what was measured)"
    fleet("--front-ms", type=float, metavar="MS", help=text)
    text = "HTTP after the engine, for each output of a step (default: what was measured)"
    fleet("--front-output-ms", type=float, metavar="MS", help=text)
    text = "messages between two steps (default: what was measured)"
    fleet("--step-ms", type=float, metavar="MS", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 with one line of text if it failed, or 130 if interrupted."""
    try:
        return int(arguments.run(arguments))
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_plan(arguments: argparse.Namespace) -> int:
    """Calibrate or plan. Returns 1 if a goal was given and no layout meets it."""
    a = arguments
    model = a.model or str(files("quire.configs") / "demo")
    if a.calibrate:
        return _calibrate(a, model)
    given = [name for name in (*MEASURED_ONLY, "http") if getattr(a, name) is not None]
    if given:
        raise ConfigurationError(f"--{given[0].replace('_', '-')} needs --calibrate")
    if a.ignore_eos is False:
        raise ConfigurationError("a plan's answers are as long as asked for: drop --no-ignore-eos")
    check_arguments(a)
    bounds = _bounds(a)
    for flag in ("--front-ms", "--front-output-ms", "--step-ms"):
        value = getattr(a, flag[2:].replace("-", "_"))
        if value is not None and not 0 <= value < math.inf:
            raise ConfigurationError(f"{flag} must be a number of milliseconds, not negative")
    if a.rate is not None and not 0 < a.rate < math.inf:
        raise ConfigurationError("--rate must be a positive number of requests/s")
    calibration = None if a.calibration is None else load_calibration(a.calibration)
    hardware = _hardware(a, model, calibration)
    front, source = _front(a, calibration)
    plan = make_plan(
        calibration.model if calibration and a.model is None else a.model or "quire-demo",
        hardware,
        _layouts(a),
        bounds,
        a.rate,
        _workload_at(a, a.vocab_size or hardware.shape.vocab_size),
        front,
        source,
        progress=_progress,
        with_curve=a.plot is not None,
    )
    text = render(plan, f"{a.dataset_name}, {_lengths(a)}")
    print(json.dumps(to_json(plan), indent=1) if a.json else text)
    if a.plot:
        write_panels(a.plot, panels(plan), f"{plan.model}: plan", text)
        print(f"plot: {a.plot}", file=sys.stderr)
    return 0 if _is_met(plan) else 1


def _is_met(plan: Plan) -> bool:
    if plan.rate is None:
        return any(one.capacity.rate > 0 for one in plan.layouts)
    return any(one.capacity.rate >= plan.rate for one in plan.layouts)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _calibrate(a: argparse.Namespace, model: str) -> int:
    """Measure the device, write the file and say how well the fit is."""
    path = a.calibration or DEFAULT_FILE
    check_writable(path)
    if a.gpu or a.gpus or a.layout or a.plot or a.rate is not None or _bounds(a):
        raise ConfigurationError("--calibrate only measures: give the rest to a second quire plan")
    names = {flag.name: flag.field for flag in engine_flags()}
    given = (*SIZES, *MEASURED_ONLY, BLOCKS)
    values = {name: getattr(a, name) for name in given if getattr(a, name) is not None}
    fields = {names[name]: value for name, value in values.items()}
    config = EngineConfig(model=model, speculation="off", **fields)
    served = None
    if a.http is not False:
        # The server has the device for itself: the engine that is measured alone starts after it.
        try:
            from .serving_runs import measure_server
        except ModuleNotFoundError as error:
            if error.name != "aiohttp":
                raise
            text = f"measuring HTTP needs aiohttp: {install_extra('bench')}, or give --no-http"
            raise StartupError(text) from error
        served = measure_server(model, values, _progress)
    # Imported late, so that a wrong command line is refused without the second that torch takes.
    from ...engine.plan.measuring import calibrate
    from ...engine.runner.worker import Worker

    calibration = calibrate(config, Worker(config), progress=_progress)
    if served is not None:
        _progress("fitting")
        shape, times, messages = calibration.shape, calibration.times, calibration.messages
        serving = fit_serving(*served, shape, times, messages)
        calibration = replace(calibration, serving=serving)
    calibration.save(path)
    print(f"\n{describe_calibration(calibration)}")
    if calibration.serving is not None and calibration.serving.stretch > LARGE_STRETCH:
        print("warning: something else used the machine: calibrate again", file=sys.stderr)
    print(f"calibration: {path}")
    if calibration.num_left:
        print(f"warning: no time for {calibration.num_left} kinds of many rows", file=sys.stderr)
    return 0


def _front(a: argparse.Namespace, calibration: Calibration | None) -> tuple[Front, FrontSource]:
    """Return the HTTP processes that are planned for: as measured, if they were, but for what flags
    give. Raises ConfigurationError for a client that was not measured."""
    serving = None if calibration is None else calibration.serving
    times = FrontTimes()
    source: FrontSource = "left out"
    if serving is not None:
        times, source = serving.front(with_client=a.with_client), "measured"
    elif a.with_client:
        raise ConfigurationError("--with-client needs a calibration with --http")
    if a.front_ms is not None:
        times = replace(times, request=a.front_ms / 1e3, prompt_token=0.0, latency=0.0)
    if a.front_output_ms is not None:
        times = replace(times, message=0.0, output=a.front_output_ms / 1e3)
    if a.front_ms is not None or a.front_output_ms is not None:
        source = "given"
    return Front(times, a.http_workers), source


def _bounds(a: argparse.Namespace) -> tuple[Bound, ...]:
    found = []
    for name in BOUNDS:
        value = getattr(a, name.replace("-", "_"))
        if value is not None:
            if not value > 0:
                raise ConfigurationError(f"--{name} must be above 0")
            found.append(Bound.read(name, value))
    return tuple(found)


def _layouts(a: argparse.Namespace) -> list[Layout]:
    if a.layout:
        if a.gpus is not None:
            raise ConfigurationError("give --gpus or --layout, not both")
        return sorted({Layout.read(text) for text in a.layout})
    return layouts_of(a.gpus or 1, max_tp=8 if a.gpu else 1)


def _lengths(a: argparse.Namespace) -> str:
    if a.dataset_name == "trace":
        return str(a.trace_file)
    prefix = f" after a prefix of {a.prefix_len}" if a.prefix_len else ""
    choices = f", {a.n} choices" if a.n > 1 else ""
    return f"{a.random_input_len} in{prefix} / {a.random_output_len} out{choices}"


def _workload_at(a: argparse.Namespace, vocab_size: int) -> Callable[[float], list[PlannedRequest]]:
    """Return a function that makes the requests at a rate, the same ones at every rate."""
    workload = build_workload(dataset_options(a, vocab_size))
    prompts = [request.prompt for request in workload.requests]
    if not all(isinstance(prompt, list) for prompt in prompts):
        raise ConfigurationError("a trace for a plan has prompt_len or token ids, not text")
    count = len(workload.requests)
    own = workload.arrivals
    own_rate = None if own is None or not own[-1] else (count - 1) / own[-1]

    def workload_at(rate: float) -> list[PlannedRequest]:
        if own is not None and own_rate is not None:  # a trace's own times, faster or slower
            arrivals = [time * own_rate / rate for time in own]
        else:
            arrivals = arrival_times(count, rate, 1.0, a.seed)
        return [
            PlannedRequest(arrival, request.prompt, request.output_len, a.n)  # type: ignore[arg-type]
            for arrival, request in zip(arrivals, workload.requests, strict=True)
        ]

    return workload_at


def _hardware(a: argparse.Namespace, model: str, calibration: Calibration | None) -> Hardware:
    """Return what is planned for. Raises ConfigurationError if too little is given."""
    if calibration is None and a.gpu is None:
        raise ConfigurationError(
            "whose step times? Give --calibration FILE, which quire plan --calibrate makes, or "
            f"--gpu with one of {', '.join(GPUS)}"
        )
    gpu = None if a.gpu is None else gpu_named(a.gpu)
    shape, described = None, None
    if calibration is not None:
        shape = calibration.shape
        if a.model is not None and a.model != calibration.model:
            raise ConfigurationError(f"{a.calibration} was measured with {calibration.model}")
    if gpu is not None:
        source = calibration.model if calibration is not None else model
        described, estimated = _describe(source, a, shape)
        shape = shape or estimated
    assert shape is not None
    sizes = {name: getattr(a, name) for name in SIZES if getattr(a, name) is not None}
    blocks = getattr(a, BLOCKS)
    if blocks is not None:
        sizes["num_blocks"] = blocks
    elif calibration is not None and "block_size" in sizes:
        tokens = shape.num_blocks * shape.block_size
        sizes["num_blocks"] = tokens // sizes["block_size"]
    messages = MessageTimes() if calibration is None else calibration.messages
    if a.step_ms is not None:
        messages = replace(messages, step=a.step_ms / 1e3)
    return Hardware(
        shape=replace(shape, **sizes),
        calibration=calibration,
        model=described,
        messages=messages,
        gpu=gpu,
        fixed_blocks=blocks is not None,
    )


def _describe(
    model: str, a: argparse.Namespace, measured: EngineShape | None
) -> tuple[ModelShape, EngineShape]:
    """Return a model's shape and the sizes of its engine on a GPU, from its files. Its layers have
    the groups of an engine that was measured, if there is one. Raises ConfigurationError if the
    files do not say enough."""
    from ..text.torch_free import import_transformers

    import_transformers()
    from ...engine.model.model_spec import read_hf_config, spec_from_hf_config
    from ...engine.model.outline import outline

    config = EngineConfig(model=model)
    found = outline(config, keeps_groups=False)
    if found.refused or not (found.num_parameters and found.weight_bytes):
        reason = found.refused or "its weights are not on this machine"
        raise ConfigurationError(f"the size of {model} is not known: {reason}")
    if found.state_bytes:
        raise ConfigurationError(f"{model} has layers that keep a state; no plan knows them")
    spec = spec_from_hf_config(read_hf_config(config), config)
    max_model_len, size = a.max_model_len or spec.max_position, a.block_size or config.block_size
    if measured is not None:
        max_model_len, size = measured.max_model_len, measured.block_size
    windows = spec.lines.windows
    groups = LayerGroups.choose(windows, max_model_len, size)
    shape = ModelShape(
        num_parameters=found.num_parameters,
        weight_bytes=found.weight_bytes,
        kv_bytes_per_token=found.kv_bytes_per_token or spec.kv_bytes_per_token(2),
        num_layers=spec.num_layers,
        num_places=groups.num_places * spec.num_layers // len(windows),
        hidden_size=spec.num_attention_heads * spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
        num_attention_heads=spec.num_attention_heads,
    )
    return shape, EngineShape(
        num_blocks=1,  # replaced by what fits into the memory
        block_size=size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        runs_ahead=True,
        group_windows=groups.windows,
    )
