"""Test that the Kubernetes manifests fit the image, the settings and each other.

check_kubernetes.py compares them with Kubernetes' own schemas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from quire.server.api import operations
from quire.server.metrics.metrics import Metrics
from quire.server.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OVERLAYS = sorted((FOLDER / "overlays").iterdir())


def read(path: str) -> Any:
    return yaml.safe_load((FOLDER / path).read_text(encoding="utf-8"))


POD = read("base/deployment.yaml")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def literals(kustomization: Path) -> dict[str, str]:
    (generator,) = yaml.safe_load(kustomization.read_text("utf-8"))["configMapGenerator"]
    return dict(each.split("=", 1) for each in generator["literals"])


def settings_of(overlay: Path) -> Settings:
    merged = literals(FOLDER / "base/kustomization.yaml") | literals(overlay / "kustomization.yaml")
    names = {name.removeprefix("QUIRE_").lower(): value for name, value in merged.items()}
    return load_settings(**{name: value for name, value in names.items() if value})


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_settings_exist_and_the_pod_may_take_as_long_as_a_drain(overlay: Path) -> None:
    settings = settings_of(overlay)
    wait = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= wait + settings.shutdown_timeout + 10


def test_probes_ask_routes_that_exist() -> None:
    routes = {
        route.path
        for router in (operations.public, operations.router)
        for route in router.routes
        if isinstance(route, APIRoute)
    }
    paths = {
        kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("liveness", "readiness", "startup")
    }
    assert paths == {"liveness": "/live", "readiness": "/ready", "startup": "/live"}
    assert set(paths.values()) <= routes
    assert (
        read("components/monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"][0]["path"]
        in routes
    )


def test_the_pod_is_the_image_s() -> None:
    user = re.search(r"^USER (\d+):(\d+)", DOCKERFILE, re.M)
    assert user and POD["securityContext"]["runAsUser"] == int(user[1])
    assert POD["securityContext"]["runAsGroup"] == int(user[2])
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [8000]
    assert "EXPOSE 8000" in DOCKERFILE and 'CMD ["serve", "--host", "0.0.0.0"]' in DOCKERFILE
    home = re.search(r"^WORKDIR (/home/\w+)", DOCKERFILE, re.M)
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert home and mounts == {"/tmp", f"{home[1]}/.cache"}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {
        volume["name"] for volume in POD["volumes"]
    }


def test_the_pod_needs_no_rights() -> None:
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_service_sets_no_port_for_its_own_pods() -> None:
    assert read("base/service.yaml")["metadata"]["name"] == "quire"
    assert POD["enableServiceLinks"] is False


def test_the_autoscaler_reads_metrics_that_exist() -> None:
    page = Metrics("m").render()[0].decode()
    scaled = read("components/autoscaling/scaledobject.yaml")["spec"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
    assert len(queries) == 2
    for query in queries:
        (name,) = re.findall(r"quire:\w+", query)
        assert f"\n{name}{{" in page
        assert 'namespace="quire"' in query  # that of both overlays
    assert scaled["scaleTargetRef"]["name"] == read("base/deployment.yaml")["metadata"]["name"]
    threshold = float(scaled["triggers"][1]["metadata"]["threshold"])
    for overlay in OVERLAYS:
        assert yaml.safe_load((overlay / "kustomization.yaml").read_text())["namespace"] == "quire"
        assert threshold < settings_of(overlay).engine_config().max_num_seqs


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_has_resources_and_an_image(overlay: Path) -> None:
    text = (overlay / "kustomization.yaml").read_text(encoding="utf-8")
    kustomization = yaml.safe_load(text)
    (image,) = kustomization["images"]
    assert image["name"] == CONTAINER["image"]
    patch = yaml.safe_load(kustomization["patches"][0]["patch"])
    (resources,) = (each["value"] for each in patch if each["path"].endswith("/resources"))
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    (components,) = re.findall(r"^# components: \[(.*)\]", text, re.M)
    for name in components.split(", "):
        assert (overlay / name / "kustomization.yaml").is_file()
