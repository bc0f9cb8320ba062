"""Workloads of `quire bench serve`: the same seed gives the same prompts at the same times."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from quire.engine.errors import ConfigurationError
from quire.server.bench.dataset import DatasetOptions, arrival_times, build_workload

OPTIONS = DatasetOptions(
    name="random",
    num_prompts=50,
    input_len=20,
    output_len=10,
    range_ratio=0.5,
    prefix_len=0,
    trace_file=None,
    vocab_size=1000,
    seed=7,
)


def lengths(**options: Any) -> tuple[list[int], list[int]]:
    requests = build_workload(OPTIONS._replace(**options)).requests
    return [len(r.prompt) for r in requests], [r.output_len for r in requests]


@pytest.mark.parametrize("name", ["random", "lognormal", "shared-prefix", "n-sampling"])
@pytest.mark.parametrize("vocab_size", [1000, None])
def test_the_seed_determines_the_workload(name: Any, vocab_size: int | None) -> None:
    options = OPTIONS._replace(name=name, vocab_size=vocab_size)
    assert build_workload(options) == build_workload(options)
    assert build_workload(options) != build_workload(options._replace(seed=8))


def test_lengths_are_uniform_within_the_ratio() -> None:
    inputs, outputs = lengths(num_prompts=2000)
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (10, 30, 5, 15)
    assert fmean(inputs) == pytest.approx(20, rel=0.05)
    assert lengths(range_ratio=0.0) == ([20] * 50, [10] * 50)


def test_prompts_have_the_requested_number_of_token_ids_or_words() -> None:
    for request in build_workload(OPTIONS).requests:
        assert isinstance(request.prompt, list)
        assert all(type(token) is int and 0 <= token < 1000 for token in request.prompt)
    for request in build_workload(OPTIONS._replace(vocab_size=None, range_ratio=0.0)).requests:
        assert isinstance(request.prompt, str) and len(request.prompt.split()) == 20


def test_lognormal_lengths_have_the_mean_and_a_tail() -> None:
    inputs, _ = lengths(name="lognormal", input_len=200, num_prompts=20_000)
    assert fmean(inputs) == pytest.approx(200, rel=0.05)
    assert sorted(inputs)[10_000] == pytest.approx(200 * math.exp(-0.5), rel=0.05)
    assert min(inputs) >= 1 and max(inputs) <= 1600


@pytest.mark.parametrize("vocab_size", [1000, None])
def test_only_the_shared_prefix_is_shared(vocab_size: int | None) -> None:
    options = OPTIONS._replace(name="shared-prefix", prefix_len=30, vocab_size=vocab_size)
    prompts = [
        r.prompt.split() if isinstance(r.prompt, str) else r.prompt
        for r in build_workload(options).requests
    ]
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 50
    assert all(40 <= len(prompt) <= 60 for prompt in prompts)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_are_a_gamma_process(burstiness: float) -> None:
    times = arrival_times(20_000, 5.0, burstiness, 3)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0.0 and min(gaps) >= 0.0
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    # The coefficient of variation of a gamma distribution of shape k is 1/sqrt(k).
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times == arrival_times(20_000, 5.0, burstiness, 3)
    assert times != arrival_times(20_000, 5.0, burstiness, 4)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


# -- traces ----------------------------------------------------------------------------------


def trace(path: Path, *lines: str, **options: Any) -> Any:
    file = path / "trace.jsonl"
    file.write_text("\n".join(lines))
    values: dict[str, Any] = {"name": "trace", "trace_file": file} | options
    return build_workload(OPTIONS._replace(**values))


def test_a_trace_gives_prompts_lengths_and_arrivals(tmp_path: Path) -> None:
    workload = trace(
        tmp_path,
        '{"prompt": "a b", "output_len": 3, "arrival": 10}',
        '{"prompt": [1, 2], "output_len": 4, "arrival": 10.5}',
        "",
        '{"prompt_len": 6, "output_len": 5, "arrival": 12}',
        '{"prompt_len": 6, "output_len": 5, "arrival": 13}',
        num_prompts=3,
    )
    assert [request.output_len for request in workload.requests] == [3, 4, 5]
    assert workload.requests[0].prompt == "a b" and workload.requests[1].prompt == [1, 2]
    assert len(workload.requests[2].prompt) == 6
    assert workload.arrivals == [0.0, 0.5, 2.0]


def test_a_trace_without_arrivals_follows_the_rate(tmp_path: Path) -> None:
    assert trace(tmp_path, '{"prompt": "a", "output_len": 3}').arrivals is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"trace.jsonl:1"),
        ('{"prompt": "a"}', "output_len"),
        ('{"output_len": 3}', "either prompt or prompt_len"),
        ('{"prompt": "a", "prompt_len": 3, "output_len": 3}', "either prompt or prompt_len"),
        ('{"prompt": "a", "output_len": 0}', "at least 1"),
        ('{"prompt_len": 0, "output_len": 1}', "at least 1"),
        ('{"prompt": "a", "output_len": 1, "arival": 1}', "arival"),
        (
            '{"prompt": "a", "output_len": 1, "arrival": 2}\n{"prompt": "a", "output_len": 1}',
            "none",
        ),
        ("", "empty"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        trace(tmp_path, line)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the trace"):
        build_workload(OPTIONS._replace(name="trace", trace_file=tmp_path / "none"))
