"""The lock files of the image, against what quire needs and what the tests ran with."""

from __future__ import annotations

import contextlib
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/supply_chain"
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?: ; ([^\\\n]+?))? \\\n((?:    --hash=.*\n)+)", re.M)
DIGEST = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def entries(name: str) -> dict[str, str]:
    """Return the versions by package, after checking that each has digests and nothing is left."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    found = {}
    for match in ENTRY.finditer(text):
        assert all(DIGEST.fullmatch(line) for line in match[4].splitlines()), match[1]
        found[canonicalize_name(match[1])] = match[2]
    rest = ENTRY.sub("", text)
    assert all(line.startswith("#") for line in rest.splitlines()), rest
    return found


COMMON, CUDA = entries("requirements.lock"), entries("requirements-cuda.lock")
LOCKED = COMMON | CUDA


def test_the_locks_hold_what_quire_needs_in_the_versions_that_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["gguf"] + extras["quantized"]:
        requirement = Requirement(text)
        version = LOCKED[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text}: run make lock"
    constraints = (ROOT / "configs/constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", constraints, re.M))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    different = {name for name, version in LOCKED.items() if pinned.get(name, version) != version}
    assert different == set(), "run make lock"
    assert pinned.keys() & LOCKED.keys() > {"torch", "fastapi", "numba"}


def test_the_locks_hold_what_each_of_their_packages_needs() -> None:
    """The image installs without looking for dependencies."""
    environment = {"platform_machine": "x86_64", "sys_platform": "linux", "extra": ""}
    num_installed = 0
    for name in LOCKED:
        with contextlib.suppress(PackageNotFoundError):  # what only CUDA needs is not here
            needed = [Requirement(text) for text in requires(name) or []]
            num_installed += 1
            for requirement in needed:
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    assert canonicalize_name(requirement.name) in LOCKED, f"{name}: {requirement}"
    assert num_installed > 50


def test_only_builds_for_cuda_get_what_only_they_need() -> None:
    assert not [name for name in COMMON if name.startswith(("torch", "nvidia", "cuda", "triton"))]
    assert {"torch", "triton"} < CUDA.keys()
