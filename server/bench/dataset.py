"""The requests of a benchmark: prompts, lengths and arrival times, all decided by one seed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from ...engine.errors import ConfigurationError

DatasetName = Literal["random", "lognormal", "shared-prefix", "n-sampling", "trace"]
Endpoint = Literal["/v1/completions", "/v1/chat/completions"]

DEFAULT_LENGTHS: dict[str, tuple[int, int]] = {
    "random": (1024, 128),
    "lognormal": (200, 180),
    "shared-prefix": (128, 128),
    "n-sampling": (256, 128),
}
"""Default prompt and output tokens; for shared-prefix, the prompt tokens after the prefix."""
LOGNORMAL_SIGMA = 1.0
LOGNORMAL_CUT = 8.0
"""Maximum length, in means: otherwise one request of 100,000 tokens could decide a whole run."""

_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
car city name team minute idea body back parent face level office door health person art war
history party result change morning reason research girl guy moment air teacher force
"""
WORDS = tuple(_WORDS.split())
"""Common words, each a single token in most vocabularies."""


class BenchRequest(NamedTuple):
    """One request before it is sent: its prompt (text or token ids) and its tokens per choice."""

    prompt: str | list[int]
    output_len: int


class Workload(NamedTuple):
    """The requests of a run.

    `arrivals` are a trace's own arrival times, in seconds from its first one. None means that the
    request rate decides them.
    """

    requests: list[BenchRequest]
    arrivals: list[float] | None


class DatasetOptions(NamedTuple):
    """The flags that decide the requests.

    Prompts are random token ids below `vocab_size`, or random words if it is None.
    """

    name: DatasetName
    num_prompts: int
    input_len: int
    output_len: int
    vocab_size: int | None
    seed: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    trace_file: Path | None = None


def dataset_options(arguments: argparse.Namespace, vocab_size: int | None) -> DatasetOptions:
    """Return the dataset that the arguments ask for; see DatasetOptions for `vocab_size`."""
    a = arguments
    return DatasetOptions(
        name=a.dataset_name,
        num_prompts=a.num_prompts,
        input_len=a.random_input_len,
        output_len=a.random_output_len,
        range_ratio=a.random_range_ratio,
        prefix_len=a.prefix_len,
        trace_file=a.trace_file,
        vocab_size=vocab_size,
        seed=a.seed,
    )


def build_workload(options: DatasetOptions) -> Workload:
    """Return the workload; the same options give the same one.

    Raises ConfigurationError for a bad trace.
    """
    rng = np.random.default_rng(options.seed)
    if options.name == "trace":
        return _read_trace(options, rng)
    inputs = _lengths(options, options.input_len, rng)
    outputs = _lengths(options, options.output_len, rng)
    # The prefix has a generator of its own, so that it does not depend on the number of prompts.
    prefix_rng = np.random.default_rng([options.seed, 1])
    prefix = _tokens(options.vocab_size, options.prefix_len, prefix_rng)
    requests = [
        BenchRequest(_join(prefix, _tokens(options.vocab_size, length, rng)), output)
        for length, output in zip(inputs, outputs, strict=True)
    ]
    return Workload(requests, None)


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Return the arrival times in seconds after the start, the first at 0.

    The gaps follow a gamma distribution with mean 1/rate and shape `burstiness`: 1 is a Poisson
    process, and below 1 requests come in bursts. With an infinite rate all arrive at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = np.random.default_rng([seed, 2])
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), count)
    gaps[0] = 0.0
    return [float(time) for time in np.cumsum(gaps)]


def _lengths(options: DatasetOptions, mean: int, rng: np.random.Generator) -> list[int]:
    count = options.num_prompts
    if options.name == "lognormal":
        # The mean of a lognormal distribution is exp(mu + sigma²/2).
        mu = math.log(mean) - LOGNORMAL_SIGMA**2 / 2
        drawn = rng.lognormal(mu, LOGNORMAL_SIGMA, count)
        return [int(length) for length in np.clip(np.rint(drawn), 1, LOGNORMAL_CUT * mean)]
    ratio = options.range_ratio
    low, high = max(1, round(mean * (1 - ratio))), round(mean * (1 + ratio))
    return [int(length) for length in rng.integers(low, high, count, endpoint=True)]


def _tokens(vocab_size: int | None, length: int, rng: np.random.Generator) -> str | list[int]:
    if vocab_size is not None:
        drawn: list[int] = rng.integers(0, vocab_size, length).tolist()
        return drawn
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), length))


def _join(prefix: str | list[int], rest: str | list[int]) -> str | list[int]:
    if isinstance(prefix, str) and isinstance(rest, str):
        return f"{prefix} {rest}" if prefix else rest
    assert isinstance(prefix, list) and isinstance(rest, list)
    return prefix + rest


class _TraceLine(msgspec.Struct, forbid_unknown_fields=True):
    output_len: int
    prompt: str | list[int] | None = None
    prompt_len: int | None = None
    arrival: float | None = None


def _read_trace(options: DatasetOptions, rng: np.random.Generator) -> Workload:
    path = options.trace_file
    assert path is not None
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error.strerror}") from error
    entries: list[_TraceLine] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(entries) < options.num_prompts:
            entries.append(_parse_line(line, f"{path}:{number}"))
    if not entries:
        raise ConfigurationError(f"the trace {path} is empty")
    requests = [
        BenchRequest(
            _tokens(options.vocab_size, entry.prompt_len or 1, rng)
            if entry.prompt is None
            else entry.prompt,
            entry.output_len,
        )
        for entry in entries
    ]
    return Workload(requests, _trace_arrivals([entry.arrival for entry in entries], path))


def _parse_line(line: bytes, where: str) -> _TraceLine:
    try:
        entry = msgspec.json.decode(line, type=_TraceLine)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    if (entry.prompt is None) == (entry.prompt_len is None):
        raise ConfigurationError(f"{where}: give either prompt or prompt_len")
    if entry.output_len < 1 or (entry.prompt_len is not None and entry.prompt_len < 1):
        raise ConfigurationError(f"{where}: lengths must be at least 1")
    return entry


def _trace_arrivals(arrivals: Sequence[float | None], path: Path) -> list[float] | None:
    given = [arrival for arrival in arrivals if arrival is not None]
    if not given:
        return None
    if len(given) < len(arrivals) or sorted(given) != given:
        raise ConfigurationError(
            f"{path}: give an arrival on every line, in ascending order, or on none"
        )
    return [arrival - given[0] for arrival in given]
