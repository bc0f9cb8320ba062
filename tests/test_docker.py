"""Test the image, the compose file, and the files for Prometheus and Grafana.

They are checked as far as possible without a container engine.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.config import EngineInfo
from quire.engine.errors import QuireError
from quire.engine.outputs import EngineStats, FinishReason, TierStats, Timings
from quire.server.metrics.histograms import RequestRecord
from quire.server.metrics.metrics import Metrics
from quire.server.serving.http_server import routing_counter
from quire.server.settings import Settings, load_settings
from quire.server.tenants.key_metrics import KeyMetrics

ROOT = Path(__file__).resolve().parent.parent
GRAFANA = ROOT / "configs/grafana"


class Instruction(NamedTuple):
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def _dockerfile() -> list[list[Instruction]]:
    """Return one list of instructions per stage, after a list of those before the first FROM."""
    text = (ROOT / "Dockerfile").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stages: list[list[Instruction]] = [[]]
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, rest = line.split(None, 1)
            if name == "FROM":
                stages.append([])
            stages[-1].append(Instruction(name, rest))
    return stages


def _only(stage: list[Instruction], name: str) -> Instruction:
    (instruction,) = (item for item in stage if item.name == name)
    return instruction


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


# -- Dockerfile ------------------------------------------------------------------------------


def test_copied_paths_exist_and_reach_the_builder() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    _, build, _ = _dockerfile()
    copied = [source for item in build if item.name == "COPY" for source in item.words[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert Path(source).parts[0] in allowed, source
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {Path(folder).parts[0] for folder in tools["package-dir"].values()} <= set(copied)


def test_constraints_are_copied_before_anything_is_installed() -> None:
    _, build, _ = _dockerfile()
    names = [item.text for item in build]
    assert "PIP_CONSTRAINT=/build/configs/constraints.txt" in _only(build, "ENV").words
    assert _only(build, "WORKDIR").text == "/build"
    first_install = next(i for i, text in enumerate(names) if "pip install" in text)
    assert names.index("configs/constraints.txt configs/") < first_install


def test_dependencies_are_installed_by_their_digests() -> None:
    _, build, _ = _dockerfile()
    commands = "\n".join(item.text for item in build if item.name == "RUN")
    installs = [text.split() for text in re.findall(r"pip install ([^;&\n]*)", commands)]
    locked = [words for words in installs if "--require-hashes" in words]
    assert [Path(words[-1]).name for words in locked] == [
        *("requirements.lock", "requirements-cuda.lock"),
    ]
    for words in locked:
        assert {"--no-deps", "--only-binary"} <= set(words)
        assert (ROOT / words[-1]).is_file()
    # The others are PyTorch's own builds, what the builder asks for, and quire itself.
    cpu, other, extra, own = (words[-1] for words in installs if words not in locked)
    assert (cpu, extra, own) == ("torch", "${EXTRA_PACKAGES}", ".")
    assert "${TORCH_VARIANT}" in other


def test_last_stage_serves_as_an_unprivileged_user() -> None:
    _, _, runtime = _dockerfile()
    assert _only(runtime, "USER").text.split(":")[0].isdecimal()  # Kubernetes wants a number
    assert int(_only(runtime, "USER").text.split(":")[0]) > 0
    after_user = runtime[runtime.index(_only(runtime, "USER")) :]
    assert not [item for item in after_user if item.name in ("RUN", "COPY")]
    assert _only(runtime, "ENTRYPOINT").words == ["quire"]
    assert _only(runtime, "CMD").words == ["serve", "--host", "0.0.0.0"]
    assert _only(runtime, "EXPOSE").text == str(Settings.model_fields["port"].default)
    assert "OMP_WAIT_POLICY=passive" in _only(runtime, "ENV").words


@pytest.mark.parametrize("status", [200, 503])
def test_healthcheck_tells_a_live_server_from_a_dead_one(status: int) -> None:
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    _, _, runtime = _dockerfile()
    _, command = _only(runtime, "HEALTHCHECK").text.split("CMD ")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = subprocess.run(
            [sys.executable, *json.loads(command)[1:]],
            env={"QUIRE_PORT": str(server.server_port)},
            capture_output=True,
        )
        server.shutdown()
    assert paths == ["/health"]
    assert (result.returncode == 0) == (status == 200)


# -- compose ---------------------------------------------------------------------------------


def test_compose_file_fits_the_compose_specification() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_services_fit_the_image_and_each_other() -> None:
    services = _yaml("docker-compose.yml")["services"]
    _, _, runtime = _dockerfile()
    (home,) = {item.text for item in runtime if item.name == "WORKDIR"}
    for name in ("quire", "quire-gpu"):
        service = services[name]
        settings = {key for key in service["environment"] if key.startswith("QUIRE_")}
        assert {key.removeprefix("QUIRE_").lower() for key in settings} <= set(
            Settings.model_fields
        )
        assert [port.rsplit(":", 1)[1] for port in service["ports"]] == ["8000"]
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace > Settings.model_fields["shutdown_timeout"].default
        assert all(volume.split(":")[1].startswith(home) for volume in service["volumes"])
    assert "profiles" not in services["quire"] and services["quire-gpu"]["profiles"] == ["gpu"]
    (device,) = services["quire-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert services["quire-gpu"]["build"]["args"].keys() <= {
        item.text.split("=")[0] for item in _dockerfile()[0] if item.name == "ARG"
    }
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).is_dir(), source


def test_prometheus_finds_the_services() -> None:
    services = _yaml("docker-compose.yml")["services"]
    config = _yaml("configs/prometheus/prometheus.yml")
    ((scrape,),) = (job["dns_sd_configs"] for job in config["scrape_configs"])
    assert set(scrape["names"]) == {name for name in services if name.startswith("quire")}
    _, _, runtime = _dockerfile()
    assert str(scrape["port"]) == _only(runtime, "EXPOSE").text
    for name in config["rule_files"]:
        assert (ROOT / "configs/prometheus" / name).is_file()
    (command,) = (item for item in services["prometheus"]["command"] if "config.file" in item)
    (mount,) = (item for item in services["prometheus"]["volumes"] if item.startswith("."))
    assert command == f"--config.file={mount.split(':')[1]}/prometheus.yml"


def test_grafana_is_provisioned_from_the_mounted_folders() -> None:
    grafana = _yaml("docker-compose.yml")["services"]["grafana"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    (provider,) = _yaml("configs/grafana/provisioning/dashboards/quire.yml")["providers"]
    assert mounts[provider["options"]["path"]] == "./configs/grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./configs/grafana/provisioning"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / mounts[str(home.parent)] / home.name).is_file()
    (source,) = _yaml("configs/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert _yaml("docker-compose.yml")["services"].keys() >= {source["url"][7:].split(":")[0]}
    dashboard = json.loads((GRAFANA / "dashboards/quire.json").read_text())
    used = {
        target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]
    }
    assert used == {source["uid"]}


# -- metrics ---------------------------------------------------------------------------------


def exported_samples() -> dict[str, set[str]]:
    """Map each sample that /metrics can export to its label names."""
    metrics = Metrics("m")
    info = EngineInfo(
        model="m", architecture="a", device="cpu", dtype="float32", num_parameters=1,
        vocab_size=8, max_model_len=64, block_size=16, num_blocks=4, kv_bytes_per_token=1,
 max_num_batched_tokens=512,
 is_asynchronous=False,
        max_num_seqs=4, max_logprobs=1, eos_token_ids=(), max_loras=1, keeps_evicted=True,
    )  # fmt: skip
    metrics.engine_ready(info)
    routing_counter(metrics)(1, 1)
    tiers = [TierStats("host", 1, 1, 1, 1, 1, 1, 1)]
    metrics.observe_step(EngineStats(*[1] * 12, running_adapters=["a"], tiers=tiers))
    metrics.request_rejected("queue_full")
    metrics.request_finished(
        RequestRecord(
            prompt_tokens=1, max_tokens=1, finish_reasons=("stop",),
            generation_tokens=(1,), timings=Timings(0.0, 0.0, 0.0),
        )
    )  # fmt: skip
    metrics.http_request("/health", "GET", 200, 0.1)
    keys = KeyMetrics(metrics)
    keys.finished("alice", 1, 1)
    keys.rejected("alice")
    page = metrics.render()[0].decode()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def _queries() -> Iterator[str]:
    dashboard = json.loads((GRAFANA / "dashboards/quire.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        yield re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["definition"])
    yield from (item["expr"] for item in dashboard["annotations"]["list"])
    for group in _yaml("configs/prometheus/alerts.yml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


RECORDED = {
    rule["record"]
    for group in _yaml("configs/prometheus/alerts.yml")["groups"]
    for rule in group["rules"]
    if "record" in rule
}


@pytest.mark.parametrize("query", sorted(set(_queries())))
def test_every_queried_metric_is_exported_with_its_labels(query: str) -> None:
    exported = exported_samples()
    names = re.findall(r"\bquire:\w+|\bhttp_\w+", query)
    recorded = re.findall(r"\bjob:[\w:]+", query)
    assert names or recorded
    assert set(recorded) <= RECORDED
    for name in names:
        assert name in exported, name
    labels = {"instance", "job"}.union(*(exported[name] for name in names))
    for selector in re.findall(r"\{(.*?)\}", query):
        selector = re.sub(r'"[^"]*"', '""', selector)
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels, selector
    for grouping in re.findall(r"by \((.*?)\)", query):
        assert set(grouping.split(", ")) <= labels, grouping
    for reason in "|".join(re.findall(r'\breason=~?"([\w|]+)"', query)).split("|"):
        assert not reason or reason in {error.code for error in _descendants(QuireError)}
    for reason in re.findall(r'\bfinished_reason="(\w+)"', query):
        assert reason in get_args(FinishReason)


def _descendants(kind: type[QuireError]) -> Iterator[type[QuireError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _descendants(child)


# -- presets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_presets_load_and_reach_the_engine(path: Path) -> None:
    settings = load_settings(config=path, api_key="key")
    settings.engine_config()
    for name in yaml.safe_load(path.read_text()):
        assert name in settings.model_fields_set, name
