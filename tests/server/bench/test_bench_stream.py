"""Every definition of docs/benchmarking.md, on events with given arrival times, without a clock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.server.bench.report import (
    DRAFT_COUNTERS,
    ClientLoad,
    RunRecords,
    RunReport,
    summarise,
    table,
    values_ms,
    warnings,
)
from quire.server.bench.stream import RequestError, RequestRecord, StreamReader

BEGIN = 100.0
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "a", "unknown": [1], **fields}).encode() + b"\n\n"


def text(text: str, index: int = 0, finish: str | None = None) -> bytes:
    return event(choices=[{"index": index, "text": text, "finish_reason": finish}])


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def usage(prompt: int, output: int, cached: int | None = None) -> bytes:
    details = {"prompt_tokens_details": None if cached is None else {"cached_tokens": cached}}
    return event(
        choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output, **details}
    )


def read(
    *arrivals: tuple[float, bytes], num_choices: int = 1, requested: int = 4, finish: bool = True
) -> RequestRecord:
    """Return the record of a stream whose pieces arrived at these seconds after the request."""
    record = RequestRecord(start=0.0, requested_output_tokens=requested, num_choices=num_choices)
    reader = StreamReader(record, BEGIN)
    for after, data in arrivals:
        reader.feed(data, BEGIN + after)
    if finish:
        reader.finish()
    return record


def test_latencies_of_a_completion() -> None:
    record = read(
        (0.5, text("a")),
        (0.6, text("b")),
        (0.8, text("c")),
        (1.1, text("d", finish="length")),
        (9.0, usage(7, 4, 3) + DONE),
    )
    assert record.ttft == pytest.approx(0.5)
    assert record.e2e == pytest.approx(1.1)
    assert record.itls == pytest.approx([0.1, 0.2, 0.3])
    assert record.tpot == pytest.approx((1.1 - 0.5) / 3)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 4, 3)


def test_tokens_are_counted_from_usage_however_they_are_chunked() -> None:
    record = read((1.0, text("a b c")), (2.0, text("d", finish="stop") + usage(5, 11) + DONE))
    assert record.output_tokens == 11
    assert record.itls == pytest.approx([1.0])
    assert record.tpot == pytest.approx(0.1)
    assert record.cached_tokens is None


def test_drafts_are_read_from_the_answer() -> None:
    """quire and OpenAI count those of a prediction; llama.cpp's server counts all, in `timings`."""
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}
    predicted = event(choices=[], usage={"completion_tokens_details": details}) + DONE
    record = read((1.0, text("a", finish="stop")), (1.1, predicted))
    assert (record.draft_tokens, record.accepted_draft_tokens) == (5, 3)
    timed = event(choices=[], usage={}, timings={"draft_n": 9, "draft_n_accepted": 4}) + DONE
    record = read((1.0, text("a", finish="stop")), (1.1, timed))
    assert (record.draft_tokens, record.accepted_draft_tokens) == (9, 4)
    record = read((1.0, text("a", finish="stop")), (1.1, usage(1, 1) + DONE))
    assert (record.draft_tokens, record.accepted_draft_tokens) == (None, None)


def test_the_role_and_the_bare_end_of_a_chat_do_not_count_as_output() -> None:
    record = read(
        (0.1, delta(role="assistant", content="")),
        (0.4, delta(content="a")),
        (0.5, delta()),  # a token whose text is held back
        (0.7, delta(reasoning_content="b")),
        (0.8, delta(tool_calls=[{"index": 0}])),
        (1.0, delta(finish="stop") + usage(5, 5) + DONE),
    )
    assert record.ttft == pytest.approx(0.4)
    assert record.itls == pytest.approx([0.1, 0.2, 0.1])
    assert record.e2e == pytest.approx(1.0)
    assert record.tpot == pytest.approx(0.6 / 4)


def test_each_choice_has_its_own_gaps_and_tokens() -> None:
    record = read(
        (1.0, text("a", 0)),
        (1.5, text("b", 1)),
        (2.0, text("c", 0, "length")),
        (3.0, text("d", 1, "length") + usage(5, 6) + DONE),
        num_choices=2,
    )
    assert record.ttft == pytest.approx(1.0)
    assert record.itls == pytest.approx([1.0, 1.5])
    assert record.tpot == pytest.approx((3.0 - 1.0) / (6 / 2 - 1))


def test_a_single_token_has_no_time_per_output_token() -> None:
    held_back = read((0.3, text("", finish="length") + usage(5, 1) + DONE))
    assert held_back.ttft == held_back.e2e == pytest.approx(0.3)
    assert held_back.tpot is None and held_back.itls == []


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_may_be_cut_anywhere(size: int) -> None:
    stream = b": keep-alive\n\n" + text("ä") + text("b") + usage(5, 2) + DONE
    stream = stream.replace(b"\n\n", b"\r\n\r\n")
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    record = read(*((float(number), piece) for number, piece in enumerate(pieces)))
    assert record.output_tokens == 2 and len(record.itls) == 1


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (text("a") + usage(1, 1), "stream_cut"),
        (usage(1, 1) + DONE, "empty_stream"),
        (text("a") + DONE, "no_usage"),
        (b"data: {\n\n", "bad_event"),
        (b'data: {"choices": 3}\n\n', "bad_event"),
        (text("a") + event(error={"message": "m", "code": "engine_dead"}), "engine_dead"),
        (event(error={"message": "m", "type": "server_error", "code": None}), "server_error"),
        (event(error="gone"), "stream_error"),
        (text("", finish="abort") + usage(1, 1) + DONE, "finish_abort"),
    ],
)
def test_bad_streams_are_errors_of_their_kind(stream: bytes, kind: str) -> None:
    with pytest.raises(RequestError) as caught:
        read((0.1, stream))
    assert caught.value.kind == kind


# -- a run -----------------------------------------------------------------------------------


def make_record(ttft: float, tpot: float, tokens: int = 11, **fields: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "requested_output_tokens": tokens, "ttft": ttft, "e2e": ttft + tpot * (tokens - 1),
        "itls": [tpot] * (tokens - 1), "prompt_tokens": 100, "output_tokens": tokens,
    }  # fmt: skip
    return RequestRecord(start=0.0, **(values | fields))


def make_report(*records: RequestRecord, **options: Any) -> RunReport:
    run = RunRecords(
        records=list(records),
        duration_s=2.0,
        peak_concurrency=3,
        client=options.pop("client", ClientLoad(cpu_share=0.1, max_lag_ms=1.0)),
        server=options.pop("server", {"num_preemptions": 2.0}),
    )
    values: dict[str, Any] = {
        "request_rate": float("inf"), "seed": 0, "percentiles": [50.0, 99.0], "slo_ms": {},
        "fixed_lengths": True, "detailed": False,
    }  # fmt: skip
    return summarise(run, **(values | options))


def test_a_run_counts_completed_requests_only() -> None:
    failed = make_record(9.0, 9.0, error="http_500", error_message="boom")
    report = make_report(
        make_record(0.1, 0.01), make_record(0.3, 0.03, cached_tokens=50), failed, failed
    )
    assert (report.num_requests, report.completed) == (4, 2)
    assert report.errors == {"http_500": 2}
    assert report.error_examples == {"http_500": "boom"}
    assert report.requests_per_s == 1.0
    assert report.output_tokens_per_s == 11.0
    assert report.total_tokens_per_s == 111.0
    assert report.cached_tokens == 50
    ttft, tpot, itl, e2e = (report.latency_ms[name] for name in ("ttft", "tpot", "itl", "e2e"))
    assert ttft and tpot and itl and e2e
    assert ttft.mean == pytest.approx(200) and ttft.percentiles["p50"] == pytest.approx(200)
    assert ttft.percentiles["p99"] == pytest.approx(100 + 0.99 * 200)
    assert tpot.mean == pytest.approx(20) and tpot.count == 2
    assert itl.count == 20 and e2e.percentiles["p50"] == pytest.approx(400)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (dict(zip(DRAFT_COUNTERS, (10.0, 40.0, 30.0), strict=True)), (10, 40, 30, 0.75)),
        ({DRAFT_COUNTERS[0]: 10.0}, (None, 8, 6, 0.75)),
        ({}, (None, 8, 6, 0.75)),
    ],
    ids=["counters", "too few counters", "answers"],
)
def test_drafts_come_from_the_counters_or_from_the_answers(
    server: dict[str, float], expected: tuple[Any, ...]
) -> None:
    records = [make_record(0.1, 0.01, draft_tokens=4, accepted_draft_tokens=3) for _ in range(2)]
    report = make_report(*records, make_record(0.1, 0.01), server=server)
    drafts = report.drafts
    assert drafts is not None
    found = (drafts.num_drafts, drafts.draft_tokens, drafts.accepted_tokens, drafts.acceptance)
    assert found == expected
    lines = [" ".join(line.split()) for line in table(report).splitlines()]
    assert f"Drafted tokens {expected[1]}" in lines
    assert f"accepted {expected[2]} ({expected[3]:.1%})" in lines
    assert ("accepted in each of the drafts 3.00 of 10" in lines) == bool(expected[0])


def test_there_are_no_drafts_without_counts() -> None:
    report = make_report(make_record(0.1, 0.01), server=dict.fromkeys(DRAFT_COUNTERS, 0.0))
    assert report.drafts is None and "raft" not in table(report)


def test_goodput_needs_every_bound() -> None:
    records = [
        make_record(0.4, 0.04),
        make_record(0.6, 0.04),
        make_record(0.4, 0.06),
        make_record(0.4, 0.0, tokens=1),
    ]
    goodput = make_report(*records, slo_ms={"ttft": 500.0, "tpot": 50.0}).goodput
    assert goodput and goodput.good_requests == 2 and goodput.requests_per_s == 1.0
    assert make_report(*records).goodput is None


def test_answers_of_unexpected_length_are_reported() -> None:
    short = make_record(0.1, 0.01, requested_output_tokens=12)
    assert make_report(short).wrong_lengths == 1
    assert "ignore_eos" in warnings(make_report(short))[0]
    assert make_report(short, fixed_lengths=False).wrong_lengths == 0
    forked = make_record(0.1, 0.01, tokens=22, requested_output_tokens=11, num_choices=2)
    assert make_report(forked).wrong_lengths == 0


def test_a_busy_client_and_failures_are_reported() -> None:
    assert warnings(make_report(make_record(0.1, 0.01))) == []
    busy = make_report(make_record(0.1, 0.01), client=ClientLoad(cpu_share=0.95, max_lag_ms=3.0))
    assert "95% of a core" in warnings(busy)[0]
    failed = make_report(make_record(0.1, 0.1, error="timeout", error_message="over 5 s"))
    assert warnings(failed) == ["1 requests failed with timeout: over 5 s"]


def test_table_has_a_row_for_each_latency_even_if_nothing_completed() -> None:
    full = table(make_report(make_record(0.1, 0.02), slo_ms={"ttft": 500.0}))
    assert "100.00" in full and "20.00" in full and "ttft ≤ 500 ms" in full
    assert "Server: num_preemptions" in full
    empty = table(make_report(make_record(0.1, 0.1, error="timeout")))
    assert "0 of 1" in empty and "failed: timeout" in empty
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        assert f"({name})" in full and f"({name})" in empty


def test_requests_are_saved_if_asked_for() -> None:
    records = [make_record(0.1, 0.02), make_record(0.2, 0.02, error="timeout")]
    assert make_report(*records).requests is None
    assert make_report(*records, detailed=True).requests == records
    assert values_ms(records, "ttft") == [100.0]
