"""The Kubernetes manifests against the schemas of Kubernetes, KEDA and the Prometheus Operator.

`make test-kubernetes` runs it: `kubectl kustomize` renders each overlay, with its components and
without, and the packages that the Makefile names validate the result.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

ROOT = Path(__file__).resolve().parents[2] / "configs/kubernetes"
OVERLAYS = sorted(path.name for path in (ROOT / "overlays").iterdir())
CUSTOM: dict[str, Any] = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}
"""Kinds that are not Kubernetes' own, and their schemas as pydantic models."""
VERSION = "1.37"


def rendered(folder: Path) -> list[dict[str, Any]]:
    command = shutil.which("kubectl")
    assert command, "kubectl is not installed"
    done = subprocess.run([command, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return an overlay in a copy of all of them."""
    shutil.copytree(ROOT, tmp_path / "kubernetes")
    return tmp_path / "kubernetes/overlays" / str(request.param)


def _lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """Return the paths of fields that a schema does not know."""
    if isinstance(given, dict):
        return [
            lost
            for name, value in given.items()
            for lost in (
                _lost(value, kept[name], f"{path}.{name}") if name in kept else [f"{path}.{name}"]
            )
        ]
    if isinstance(given, list):
        pairs = zip(given, kept, strict=True)
        return [
            lost for index, pair in enumerate(pairs) for lost in _lost(*pair, f"{path}[{index}]")
        ]
    return []


def validate(document: dict[str, Any]) -> None:
    model = CUSTOM.get(document["kind"])
    if model is None:
        kubernetes_validate.validate(document, VERSION, strict=True)
    else:
        read = model.model_validate(document)
        kept = read.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert _lost(document, kept) == []


def test_an_overlay_is_valid(overlay: Path) -> None:
    documents = rendered(overlay)
    assert {each["kind"] for each in documents} == {
        *("ConfigMap", "Deployment", "Namespace", "PodDisruptionBudget", "Service"),
    }
    for document in documents:
        validate(document)


def test_an_overlay_with_its_components_is_valid(overlay: Path) -> None:
    path = overlay / "kustomization.yaml"
    text = path.read_text(encoding="utf-8")
    assert "# components:" in text
    path.write_text(text.replace("# components:", "components:"))
    documents = rendered(overlay)
    assert CUSTOM.keys() <= {each["kind"] for each in documents}
    for document in documents:
        validate(document)


@pytest.mark.parametrize("kind", ["Deployment", *CUSTOM])
def test_a_wrong_field_is_found(overlay: Path, kind: str) -> None:
    path = overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("# components:", "components:"))
    (document,) = (each for each in rendered(overlay) if each["kind"] == kind)
    document["spec"]["wrong"] = 1
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        validate(document)
