"""The dashboard and the alerts in a real Prometheus that scrapes two real servers.

`make test-prometheus` runs it. It needs the commands `prometheus` and `promtool`; PROMETHEUS_BIN
names their folder if they are not in PATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from ..clients.conftest import KEY, MODEL, free_port, quire_serve
from ..server.test_metrics import VLLM_DASHBOARD

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "configs/prometheus/alerts.yml"
DASHBOARD = json.loads((ROOT / "configs/grafana/dashboards/quire.json").read_text("utf-8"))
SECONDS = 20
"""How long the servers are used and scraped, once a second."""
LATENCIES = ("time_to_first_token_seconds", "e2e_request_latency_seconds")
LATENCIES += ("request_queue_time_seconds",)


def command(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PROMETHEUS_BIN", ""), os.environ["PATH"]])
    found = shutil.which(name, path=path)
    assert found, f"{name} is not installed; on Debian: apt-get install prometheus"
    return found


def _panels() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']}: {target['refId']}", target["expr"]


def _filled_in(expression: str) -> str:
    """Return a query as Grafana sends it."""
    for name, value in (("model", ".*"), ("instance", ".*"), ("__rate_interval", "20s")):
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression


class Scraped(NamedTuple):
    """A Prometheus that has scraped both servers, and the log of quire's with its own prefix."""

    http: httpx.Client
    log: str
    at: float
    """When the servers were last used: queries are asked for that moment."""

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression, "time": self.at})
        assert answer.status_code == 200, answer.text
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result


def _use(address: str, until: float) -> None:
    """Chat, complete and be refused until then, with more requests than the queue takes."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
        while time.monotonic() < until:
            messages = [{"role": "user", "content": "Tell me a story about a fox"}]
            body = {"messages": messages, "max_tokens": 200, "ignore_eos": True}
            client.post("/v1/chat/completions", json=body | {"n": 2})
            client.post("/v1/completions", json={"prompt": "Once upon", "max_tokens": 20})
            client.post("/v1/completions", json={"prompt": 1})


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    small = ("--num-gpu-blocks-override", "40", "--max-model-len", "512")
    small += ("--max-num-queued-reqs", "2", "--enable-log-requests")
    own, vllm = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("vllm")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    with (
        quire_serve(own, *small) as address,
        quire_serve(vllm, "--metrics-prefix", "vllm") as other,
    ):
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [url.removeprefix("http://")]}]}
            for job, url in (("quire", address), ("vllm", other))
        ]
        every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(
            yaml.safe_dump({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs})
        )
        arguments = ["--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        arguments += [f"--web.listen-address=127.0.0.1:{port}"]
        arguments += ["--enable-feature=exemplar-storage"]
        with (folder / "log").open("wb") as log:
            prometheus = subprocess.Popen(
                [command("prometheus"), *arguments], cwd=folder, stderr=log
            )
        try:
            until = time.monotonic() + SECONDS
            with ThreadPoolExecutor(max_workers=7) as users:
                list(users.map(_use, (*[address] * 6, other), [until] * 7))
            at = time.time()
            time.sleep(2)  # for a last scrape and evaluation
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                yield Scraped(client, (own / "log").read_text(encoding="utf-8"), at)
        finally:
            prometheus.terminate()
            prometheus.wait(timeout=30)


def test_both_servers_are_scraped(scraped: Scraped) -> None:
    assert [one["value"][1] for one in scraped.query("up")] == ["1", "1"]


@pytest.mark.parametrize(("name", "expression"), list(_panels()), ids=lambda text: text[:40])
def test_every_panel_shows_something(scraped: Scraped, name: str, expression: str) -> None:
    values = [float(one["value"][1]) for one in scraped.query(_filled_in(expression))]
    assert values and not any(value != value for value in values), (name, values)


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"], ids=lambda one: one["name"])
def test_every_variable_has_a_value(scraped: Scraped, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
    assert found
    answer = scraped.http.get(f"/api/v1/label/{found[2]}/values", params={"match[]": found[1]})
    (value,) = answer.json()["data"]
    assert value == MODEL or found[2] == "instance"


def test_the_annotations_can_be_queried(scraped: Scraped) -> None:
    for annotation in DASHBOARD["annotations"]["list"]:
        scraped.query(_filled_in(annotation["expr"]))


def test_rules_are_evaluated_without_errors_and_none_fires(scraped: Scraped) -> None:
    groups = scraped.http.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 14
    for rule in rules:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule
        assert rule.get("state") != "firing", rule


def _of_vllm(name: str) -> Iterator[str]:
    """Yield queries as dashboards for vLLM write them."""
    selector = f'{{model_name="{MODEL}"}}'
    for end in VLLM_DASHBOARD[name]:
        rate = f"rate(vllm:{name}{end}{selector}[20s])"
        if end == "_bucket":
            yield f"histogram_quantile(0.9, sum by (le) ({rate}))"
        elif name == "request_success":
            yield f"sum by (finished_reason) ({rate})"
        else:
            yield rate if end else f"vllm:{name}{selector}"


@pytest.mark.parametrize("name", VLLM_DASHBOARD)
def test_dashboards_for_vllm_show_something(scraped: Scraped, name: str) -> None:
    for expression in _of_vllm(name):
        values = [float(one["value"][1]) for one in scraped.query(expression)]
        assert values and not any(value != value for value in values), (expression, values)


@pytest.mark.parametrize("name", LATENCIES)
def test_an_exemplar_names_a_request_of_the_log(scraped: Scraped, name: str) -> None:
    now = time.time()
    window = {"query": f"quire:{name}_bucket", "start": now - 600, "end": now}
    answer = scraped.http.get("/api/v1/query_exemplars", params=window)
    found = [one for series in answer.json()["data"] for one in series["exemplars"]]
    finished = {
        entry["request_id"]
        for line in scraped.log.splitlines()
        if line.startswith("{") and (entry := json.loads(line))["event"] == "request_finished"
    }
    assert found and {one["labels"]["request_id"] for one in found} <= finished


def test_each_alert_fires_when_it_should() -> None:
    for arguments in (["check", "rules", str(RULES)], ["test", "rules", "alert_rules.yml"]):
        done = subprocess.run(
            [command("promtool"), *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_scenario() -> None:
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text(encoding="utf-8")))
    tests = yaml.safe_load((Path(__file__).parent / "alert_rules.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    quiet = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if not case.get("exp_alerts")
    }
    assert fired == quiet == alerts
