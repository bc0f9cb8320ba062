"""`quire bench serve` against a scripted server, from the command line to the result files."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from quire.engine.errors import ConfigurationError, StartupError
from quire.server import cli
from quire.server.bench.arguments import check_arguments
from quire.server.bench.load import parse_counters
from quire.server.bench.measure import measure
from quire.server.bench.plot import render_svg, run_panels, ticks
from quire.server.bench.report import BenchResult, RunRecords, RunReport

from .fake_openai import Answer, FakeServer, fake_server

SLACK = 0.15  # seconds by which a busy machine may be late


def parse(*flags: str) -> Any:
    arguments = cli.build_parser().parse_args(["bench", "serve", *flags])
    check_arguments(arguments)
    return arguments


async def run_bench(server: FakeServer, *flags: str) -> tuple[BenchResult, RunRecords]:
    few = () if "--num-warmups" in flags else ("--num-warmups", "0")
    lengths = () if "--trace-file" in flags else ("--random-input-len", "8")
    return await measure(parse("--base-url", server.url, *few, *lengths, *flags))


def about(*expected: float) -> Any:
    """Expect these times, at most SLACK late and never early."""
    return pytest.approx([time + SLACK / 2 for time in expected], abs=SLACK / 2 + 0.002)


async def measure_one_run(server: FakeServer, *flags: str) -> RunReport:
    (run,) = (await run_bench(server, *flags))[0].runs
    return run


# -- measurements ----------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_measured_latencies_are_the_scripted_delays(endpoint: str) -> None:
    async with fake_server(script=lambda _: Answer((0.2, 0.1, 0.3))) as server:
        flags = ("--num-prompts", "3", "--random-output-len", "3", "--endpoint", endpoint)
        _, records = await run_bench(server, *flags)
    for record in records.records:
        assert record.error is None
        assert [record.ttft, record.e2e] == about(0.2, 0.6)
        assert record.itls == pytest.approx([0.1, 0.3], abs=SLACK)
        assert record.tpot == pytest.approx(0.2, abs=SLACK)
        assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (10, 3, 4)
    assert records.peak_concurrency == 3
    assert records.duration_s == pytest.approx(0.6, abs=2 * SLACK)


async def test_failures_are_counted_by_kind() -> None:
    answers = [
        Answer(),
        Answer(status=429),
        Answer(status=500),
        Answer(cut_after=1),
        Answer(error_event=True),
        Answer((9.0,)),
        Answer(output_tokens=1),
    ]
    async with fake_server(script=lambda number: answers[number]) as server:
        run = await measure_one_run(
            server, "--num-prompts", "7", "--random-output-len", "2", "--request-timeout", "0.5"
        )
    assert run.completed == 2 and run.wrong_lengths == 1
    assert run.errors == {
        "http_429": 1,
        "http_500": 1,
        "connection_lost": 1,
        "engine_dead": 1,
        "timeout": 1,
    }
    assert run.error_examples["http_429"] == "no" and run.error_examples["engine_dead"] == "died"


async def test_an_unreachable_server_is_an_error() -> None:
    async with fake_server() as server:
        pass
    with pytest.raises(StartupError, match="does not answer"):
        await run_bench(server)
    with pytest.raises(StartupError, match="does not answer"):
        await run_bench(server, "--model", "m", "--vocab-size", "9")


async def test_max_concurrency_is_respected() -> None:
    async with fake_server(script=lambda _: Answer((0.05, 0.0))) as server:
        run = await measure_one_run(server, "--num-prompts", "9", "--max-concurrency", "3")
        assert run.peak_concurrency == 3 and run.completed == 9
        # The connection that asked for models and counters is reused.
        assert server.connections == 3


async def test_requests_are_sent_at_the_seeded_times() -> None:
    async with fake_server() as server:
        flags = ("--num-prompts", "6", "--request-rate", "10", "--seed", "5")
        await run_bench(server, *flags)
        first = [time - server.times[0] for time in server.times]
        server.times.clear()
        await run_bench(server, *flags)
        second = [time - server.times[0] for time in server.times]
    assert first == pytest.approx(second, abs=SLACK)
    assert all(after >= before for before, after in pairwise(first)) and first[-1] > 0.1


async def test_a_kept_connection_that_the_server_closed_is_no_error() -> None:
    async with fake_server(drop_idle=True) as server:
        run = await measure_one_run(server, "--num-prompts", "4", "--max-concurrency", "1")
        assert run.completed == 4 and run.errors == {}
    async with fake_server(script=lambda _: Answer(close=True)) as server:
        assert (await measure_one_run(server, "--num-prompts", "3")).completed == 3


# -- requests --------------------------------------------------------------------------------


async def test_completion_prompts_are_token_ids_of_the_vocabulary() -> None:
    async with fake_server() as server:
        server.gets["/tokenizer_info"] = {"vocab_size": 50}
        await run_bench(server, "--num-prompts", "2", "--random-output-len", "5")
    for body in server.bodies:
        assert len(body.pop("prompt")) == 8
        assert body == {
            "model": "fake-model",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "ignore_eos": True,
            "max_tokens": 5,
        }


async def test_chat_prompts_are_words_and_n_is_sent() -> None:
    async with fake_server() as server:
        server.gets["/tokenizer_info"] = {"vocab_size": 50}
        flags = ("--dataset-name", "n-sampling", "--n", "3", "--no-ignore-eos")
        run = await measure_one_run(
            server, *flags, "--num-prompts", "2", "--random-output-len", "5",
            "--endpoint", "/v1/chat/completions",
        )  # fmt: skip
    assert run.output_tokens == 2 * 3 * 5 and run.wrong_lengths == 0
    body = server.bodies[0]
    assert (body["n"], body["temperature"], body["max_completion_tokens"]) == (3, 1.0, 5)
    assert len(body["messages"][0]["content"].split()) == 8
    assert "ignore_eos" not in body and "max_tokens" not in body


async def test_prompts_are_words_if_the_vocabulary_is_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with fake_server() as server:
        await run_bench(server, "--num-prompts", "1")
    assert len(server.bodies[0]["prompt"].split()) == 8
    assert "random words" in capsys.readouterr().out


async def test_warm_ups_use_other_prompts_and_are_not_measured() -> None:
    async with fake_server(gets={"/v1/models": {"data": [{"id": "m"}]}}) as server:
        run = await measure_one_run(
            server, "--num-prompts", "2", "--num-warmups", "3", "--vocab-size", "99"
        )
    assert run.num_requests == 2 and len(server.bodies) == 5
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 5


async def test_a_failing_warm_up_stops_the_run() -> None:
    async with fake_server(script=lambda _: Answer(status=400)) as server:
        with pytest.raises(StartupError, match="http_400: no"):
            await run_bench(server, "--num-prompts", "2", "--num-warmups", "1")
    assert len(server.bodies) == 1


async def test_a_trace_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"prompt": "a b", "output_len": 2, "arrival": 0.0}]
    lines.append({"prompt_len": 3, "output_len": 4, "arrival": 0.2})
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--dataset-name", "trace", "--trace-file", str(file), "--vocab-size", "9")
    async with fake_server() as server:
        await run_bench(server, *flags)
        with pytest.raises(ConfigurationError, match="arrivals of its own"):
            await run_bench(server, *flags, "--request-rate", "2")
    first, second = server.bodies
    assert first["prompt"] == "a b" and len(second["prompt"]) == 3
    assert (first["max_tokens"], second["max_tokens"]) == (2, 4) and "ignore_eos" not in first
    assert server.times[1] - server.times[0] == pytest.approx(0.2, abs=SLACK)


async def test_the_key_is_sent_and_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    async with fake_server() as server:
        result, _ = await run_bench(server, "--num-prompts", "1")
    assert all("authorization: bearer secret-key" in head.lower() for head in server.heads)
    assert b"secret-key" not in msgspec.json.encode(result)
    assert not any("accept-encoding" in head.lower() for head in server.heads)


async def test_base_url_may_end_with_v1() -> None:
    async with fake_server() as server:
        server.url += "/v1/"
        assert (await measure_one_run(server, "--num-prompts", "1")).completed == 1


# -- the files -------------------------------------------------------------------------------


async def run_cli(server: FakeServer, *flags: str) -> int:
    """Run the command in a thread, with its own event loop, as it runs from a shell."""
    given = ["bench", "serve", "--base-url", server.url, "--num-prompts", "4", *flags]
    return await asyncio.to_thread(cli.main, given)


async def test_a_run_writes_its_result_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "result.json", tmp_path / "plot.html"
    counted = 'vllm:num_preemptions_total{engine="0"} 3.0\n'
    async with fake_server() as server:
        server.gets["/metrics"] = counted
        flags = ("--goodput", "ttft:500", "e2el:900", "--percentiles", "50,99.9", "--save-detailed")
        code = await run_cli(server, *flags, "--result-filename", str(file), "--plot", str(plot))
    assert code == 0
    document = json.loads(file.read_text())
    jsonschema.validate(document, msgspec.json.schema(BenchResult))
    result = msgspec.convert(document, BenchResult)
    assert result.model == "fake-model" and result.versions["server"] == "1.2.3"
    assert result.command and result.date.endswith("+00:00")
    assert result.options["num_prompts"] == 4 and result.options["random_input_len"] == 1024
    (run,) = result.runs
    assert run.request_rate == "inf" and run.completed == 4 and run.cached_tokens == 16
    assert run.goodput and run.goodput.slo_ms == {"ttft": 500.0, "e2e": 900.0}
    assert run.server == {"num_preemptions": 0.0}
    assert run.requests and len(run.requests) == 4
    ttft = run.latency_ms["ttft"]
    assert ttft and list(ttft.percentiles) == ["p50", "p99.9"]
    printed = capsys.readouterr().out
    for row in ("Time to first token (TTFT)", "4 of 4", "16 (40.0%)", "p99.9", "Goodput"):
        assert row in printed
    page = plot.read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page and "Time to first token" in page


async def test_a_sweep_measures_each_rate_with_its_own_prompts(tmp_path: Path) -> None:
    file, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    async with fake_server() as server:
        flags = ("--sweep", "50,100", "--vocab-size", "99", "--num-warmups", "0")
        assert not await run_cli(
            server, *flags, "--result-filename", str(file), "--plot", str(plot)
        )
    runs = json.loads(file.read_text())["runs"]
    assert [(run["request_rate"], run["seed"]) for run in runs] == [(50.0, 0), (100.0, 1)]
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 8
    drawn = ElementTree.fromstring(plot.read_text())
    lines = drawn.findall(".//{*}polyline")
    assert len(lines) == 4 * 3 + 2  # three percentiles of four latencies; requests, tokens
    assert all(len(line.attrib["points"].split()) == 2 for line in lines)


async def test_exit_code_is_1_if_nothing_completed(capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_server(script=lambda _: Answer(status=500)) as server:
        assert await run_cli(server, "--num-warmups", "0") == 1
        assert "4 requests failed with http_500" in capsys.readouterr().err
        assert await run_cli(server) == 1
        assert "quire: a warm-up request failed" in capsys.readouterr().err


def test_counters_are_found_under_any_prefix_and_summed() -> None:
    text = (
        "# TYPE quire:num_preemptions counter\n"
        'quire:num_preemptions_total{engine="0"} 2.0\nquire:num_preemptions_total{engine="1"} 3\n'
        "vllm:prefix_cache_hits_total 7e2\nquire:prefix_cache_hits_created 9\nother 1\n"
    )
    assert parse_counters(text) == {"num_preemptions": 5.0, "prefix_cache_hits": 700.0}


@pytest.mark.parametrize(
    ("high", "expected"),
    [(0.0, [0, 1]), (1.0, [0, 0.5, 1]), (97.0, [0, 50, 100]), (4.0, [0, 1, 2, 3, 4])],
)
def test_ticks_are_round_and_reach_the_highest(high: float, expected: list[float]) -> None:
    assert ticks(high) == pytest.approx(expected)


async def test_curves_stay_within_their_panels() -> None:
    async with fake_server(script=lambda n: Answer((0.01 * n, 0.01))) as server:
        _, records = await run_bench(server, "--num-prompts", "5")
    drawn = ElementTree.fromstring(render_svg(run_panels(records)))
    for line in drawn.findall(".//{*}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 76 <= x <= 444 and 56 <= y <= 272
    assert float(line.attrib["points"].split()[-1].split(",")[1]) == 56  # 100 % at most


# -- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--dataset-name trace", "go together"),
        ("--trace-file x", "go together"),
        ("--dataset-name trace --trace-file x --random-input-len 3", "own lengths"),
        ("--dataset-name lognormal --random-range-ratio 0.5", "uniform"),
        ("--prefix-len 5", "shared-prefix"),
        ("--endpoint /v1/chat/completions --vocab-size 5", "token ids"),
        ("--sweep 1,2 --request-rate 3", "--sweep or --request-rate"),
        ("--random-range-ratio 1", "below 1"),
        ("--plot x.png", ".html and .svg, not .png"),
        ("--plot no/such/x.svg", "its folder does not exist"),
        ("--result-filename /tmp", "it is a folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        parse(*flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--request-rate 0", "--request-rate nan", "--sweep 1,inf", "--sweep 1,,2", "--seed -1",
        "--num-prompts 0", "--goodput ttft", "--goodput x:5", "--goodput ttft:-1",
        "--percentiles 101", "--num-warmups -1", "--dataset-name sharegpt", "--endpoint /v1/x",
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(flags: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*flags.split())
    assert caught.value.code == 2


def test_bad_urls_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("localhost:8000", "ftp://a", "http://", "http://user:word@host", "http://a:99999"):
        assert cli.main(["bench", "serve", "--base-url", url]) == 1
        assert capsys.readouterr().err.startswith("quire: --base-url: ")


def test_a_missing_aiohttp_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("measure", "http"):
        monkeypatch.delitem(sys.modules, f"quire.server.bench.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert cli.main(["bench", "serve"]) == 1
    said = capsys.readouterr().err
    assert said == "quire: this command needs aiohttp: pip install 'quire-server[bench]'\n"


@pytest.mark.parametrize("command", ["serve", "throughput", "latency"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", command, "--help"])
    assert caught.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_every_flag_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(--[a-z-]+) ", text, re.M)
    flags = set(re.findall(r"^  (--[a-z-]+)", _help("serve"), re.M))
    assert set(listed) == flags and len(listed) == len(flags)
    text, _, _ = text.partition("## On a GPU")  # its scripts have their own flags
    used = set(re.findall(r"--[a-z][a-z-]+", text))
    assert used <= flags | set(
        re.findall(r"--[a-z][a-z-]+", _help("serve") + _help("throughput") + _help("latency"))
    )


def _help(command: str) -> str:
    (commands,) = (
        action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)
    )
    (kinds,) = (
        action.choices for action in commands["bench"]._actions if isinstance(action.choices, dict)
    )
    return str(kinds[command].format_help())
