"""Test the command `quire plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quire.engine.plan.calibration import Calibration
from quire.engine.plan.front import FrontTimes
from quire.engine.plan.planned_engine import EngineShape, MessageTimes
from quire.engine.plan.serving import ServingTimes
from quire.engine.plan.step_times import FittedTimes, Measured, StepShape
from quire.server.cli import main

LOAD = ["--random-input-len", "64", "--random-output-len", "8", "--num-prompts", "80"]


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    """Return the file of an engine whose steps take 10 ms and 0.1 ms for each token."""
    path = tmp_path / "calibration.json"
    Calibration(
        model="tiny",
        device="cpu",
        dtype="float32",
        quire="0",
        date="",
        weight_bytes=1,
        kv_bytes_per_token=1,
        shape=EngineShape(
            num_blocks=500,
            block_size=16,
            max_num_seqs=32,
            max_num_batched_tokens=256,
            max_model_len=2048,
            vocab_size=500,
            runs_ahead=False,
        ),
        times=FittedTimes(
            base=0.01, token=1e-4, row=0.0, context=0.0, pair=0.0, over=0.0, cold=0.0, knee=0
        ),
        messages=MessageTimes(),
        serving=ServingTimes(
            http=FrontTimes(request=0.002, latency=0.001, message=0.0002, output=0.0005),
            client=FrontTimes(request=0.001),
            stretch=1.0,
            error=0.05,
        ),
        mean_error=0.021,
        max_error=0.1,
        num_left=0,
        points=(Measured(StepShape(1, 1, 1, 0), 0.01),),
    ).save(path)
    return str(path)


def plan(*flags: str) -> int:
    return main(["plan", *flags])


def test_a_plan_on_the_terminal(
    calibration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plan.svg"
    goal = ("--ttft-p50", "60", "--itl-p99", "80", "--rate", "100")
    layouts = ("--layout", "1x2", "--layout", "1x1", "--layout", "1x3")
    flags = ("--http-workers", "3", "--plot", str(plot))
    code = plan("--calibration", calibration, *LOAD, *goal, *layouts, *flags)
    text = capsys.readouterr().out
    assert (
        "tiny · random, 64 in / 8 out · step times: measured (2.1% error of the fit), 1.00" in text
    )
    assert "HTTP: measured, 3 processes; ms for each request 2.00 (and 1.00 on its way)" in text
    assert ", HTTP " in text
    assert "goal: TTFT p50 ≤ 60 ms, ITL p99 ≤ 80 ms" in text
    assert "1 × 3: one engine lost:" in text and "runs out first:" in text
    rates = [
        float(line.split()[4]) for line in text.splitlines() if line.startswith("        1 × ")
    ]
    assert len(rates) == 3 and rates == sorted(rates) and rates[2] > 2 * rates[0]
    assert code == (0 if rates[2] >= 100 else 1)
    assert ("serves 100 req/s within the goal" in text) == (code == 0)
    drawn = ElementTree.fromstring(plot.read_text())
    assert len(drawn.findall(".//{*}polyline")) == 4 * 3


def test_a_plan_as_json(calibration: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = plan("--calibration", calibration, *LOAD, "--itl-p99", "0.001", "--rate", "5", "--json")
    found = json.loads(capsys.readouterr().out)
    assert code == 1 and found["bounds"] == ["ITL p99 ≤ 0.001 ms"] and found["rate"] == 5
    (layout,) = found["layouts"]
    assert layout["max_requests_per_s"] == 0 and layout["broken_beyond"] == ["ITL p99"]
    # At 5 requests/s they hardly meet: 10 ms, 6.4 ms for the prompt, 3.7 ms outside the engine.
    assert layout["at_rate"]["ttft_ms"]["p50"] == pytest.approx(20.1, rel=0.05)
    assert layout["at_rate"]["itl_ms"]["p50"] == pytest.approx(10.1, rel=0.05)
    assert layout["step_times"] == "measured" and layout["max_requests_per_s_without_one"] is None


def test_what_lies_between_steps_is_added_to_each(
    calibration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rate", "5", "--step-ms", "3", "--front-ms", "0", "--front-output-ms", "0", "--json")
    assert plan("--calibration", calibration, *LOAD, *flags) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert 19.3 < layout["at_rate"]["ttft_ms"]["p50"] < 19.4 + 13  # some wait for others' steps
    assert layout["at_rate"]["itl_ms"]["p50"] == pytest.approx(13.1, rel=0.05)
    assert 0.2 < layout["at_rate"]["busy_by_part"]["messages"] < 0.25


def test_http_is_as_measured_or_given(calibration: str, capsys: pytest.CaptureFixture[str]) -> None:
    def at_5(*flags: str) -> tuple[str, float]:
        words = ("--calibration", calibration, *LOAD, "--rate", "5", "--json")
        assert plan(*words, *flags) == 0
        found = json.loads(capsys.readouterr().out)
        return found["front"]["source"], found["layouts"][0]["at_rate"]["ttft_ms"]["p50"]

    source, measured = at_5()
    assert source == "measured"
    source, with_client = at_5("--with-client")
    assert source == "measured" and with_client == pytest.approx(measured + 1, abs=0.5)
    source, given = at_5("--front-ms", "9", "--front-output-ms", "0")
    assert source == "given" and given == pytest.approx(measured + 5.3, abs=0.5)

    # One process bears about 500 tokens' events and requests a second, and three bear more.
    def limit(workers: str) -> tuple[float, str]:
        flags = ("--http-workers", workers, "--front-ms", "30", "--json")
        assert plan("--calibration", calibration, *LOAD, *flags) == 0
        (layout,) = json.loads(capsys.readouterr().out)["layouts"]
        return layout["max_requests_per_s"], layout["runs_out_first"]

    one, what = limit("1")
    assert one < 31 and what == "HTTP (--http-workers)"
    three, what = limit("3")
    assert three > 1.5 * one and what != "HTTP (--http-workers)"


def test_sizes_of_the_engine_can_be_changed(
    calibration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def highest(*flags: str) -> tuple[float, str]:
        assert plan("--calibration", calibration, *LOAD, "--json", *flags) == 0
        (layout,) = json.loads(capsys.readouterr().out)["layouts"]
        return layout["max_requests_per_s"], layout["runs_out_first"]

    rate, _ = highest()
    few, limit = highest("--max-num-seqs", "1")
    assert few < rate / 2 and limit == "--max-num-seqs"
    few, limit = highest("--num-gpu-blocks-override", "6", "--max-model-len", "90")
    assert few < rate / 2 and limit == "KV cache"


def test_a_trace_keeps_the_shape_of_its_arrivals(
    calibration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt_len": 30, "output_len": 4, "arrival": i // 10} for i in range(100)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--dataset-name", "trace", "--trace-file", str(trace), "--rate", "5", "--json")
    assert plan("--calibration", calibration, *flags) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    # Ten at once are read one after the other, 2 ms each, and computed in two or three steps.
    assert layout["at_rate"]["ttft_ms"]["p50"] == pytest.approx(10 + 25.6 + 10, rel=0.3)


def test_the_demo_model_is_estimated_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpu", "h100", "--gpus", "2", *LOAD, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["layouts"]
    assert (first["replicas"], second["tensor_parallel_size"]) == (2, 2)
    assert first["step_times"] == second["step_times"] == "estimated"
    assert second["at_max"]["busy_by_part"]["all-reduce"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "whose step times? Give --calibration FILE, which quire plan --calibrate makes, or"),
        ("--gpu H900", "unknown GPU 'H900': choose from A10,"),
        ("--calibration no.json", "cannot read no.json"),
        ("--calibration FILE --layout 2x1", "size of 2 was not measured: give --gpu"),
        ("--calibration FILE --layout 2", "a layout is TPxREPLICAS, such as 2x4, not '2'"),
        ("--calibration FILE --layout 1x1 --gpus 2", "give --gpus or --layout, not both"),
        ("--calibration FILE --rate -1", "--rate must be a positive number"),
        ("--calibration FILE --rate nan", "--rate must be a positive number"),
        ("--calibration FILE --ttft-p50 0", "--ttft-p50 must be above 0"),
        ("--calibration FILE --front-ms -1", "--front-ms must be a number of milliseconds, not"),
        ("--calibration FILE --step-ms nan", "--step-ms must be a number of milliseconds, not"),
        ("--calibration FILE --dtype float16", "--dtype needs --calibrate"),
        ("--calibration FILE --no-http", "--http needs --calibrate"),
        ("--gpu H100 --with-client", "--with-client needs a calibration with --http"),
        ("--calibration FILE --no-ignore-eos", "drop --no-ignore-eos"),
        ("other --calibration FILE", "was measured with tiny"),
        ("--calibration FILE --random-input-len 3000", "request 0 of the workload: "),
        ("--calibration FILE --plot x.png", ".html and .svg, not .png"),
        ("--calibrate --rate 3", "--calibrate only measures"),
        ("--calibrate --calibration no/such.json", "its folder does not exist"),
        ("--gpu H100 no/such/model", "the size of no/such/model is not known"),
    ],
)
def test_what_is_refused(
    calibration: str, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    words = [calibration if word == "FILE" else word for word in flags.split()]
    assert plan(*words) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
