"""Test what is shipped, what may import what, and that our folders never shadow a package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .sources import tree_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "engine", "kernels")
WEB = {"fastapi", "uvicorn", "starlette", "prometheus_client", "pydantic", "pydantic_settings"}
IPC = {"zmq", "msgspec"}
CONFIGS = {"quire.configs", "quire.configs.demo"}
POLICY = ("engine", "engine/cache", "engine/scheduling")


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _imports(path: Path) -> Iterator[str]:
    """Yield the absolute dotted names of everything that a file imports, lazily or not."""
    package = ["quire", *path.parent.relative_to(ROOT).parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _roots(path: Path) -> set[str]:
    """Return the top-level packages that a file imports; our own are named `quire.<folder>`."""
    return {
        ".".join(name.split(".")[:2]) if name.startswith("quire.") else name.split(".")[0]
        for name in _imports(path)
    }


# -- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that leftovers of earlier builds cannot get in."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_module_and_its_data_and_nothing_else(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = [ROOT / "configs/__init__.py", *(ROOT / "configs").glob("*.yaml")]
    wanted += [path for path in (ROOT / "configs/demo").iterdir() if path.is_file()]
    for package in PACKAGES:
        wanted += [*_modules(package), ROOT / package / "py.typed"]
    wanted += [path for path in (ROOT / "server/web").iterdir() if path.is_file()]
    assert shipped == {f"quire/{path.relative_to(ROOT).as_posix()}" for path in wanted}


def test_packages_are_the_folders_with_an_init() -> None:
    """Every package has its entry in pyproject.toml.

    setuptools takes the packages by name: one that is not listed would be missing from the wheel
    and still work in an editable install.
    """
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    names = {f"quire.{'.'.join(path.relative_to(ROOT).parts)}" for path in folders}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(listed["tool"]["setuptools"]["packages"]) == names | CONFIGS
    bare = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")} - folders
    assert bare == set()


def test_unpacked_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import quire.server.settings as settings\n"
        "import quire.engine.scheduling.scheduler as scheduler\n"
        "print(settings.__file__, scheduler.__file__, settings.load_settings().model_path)"
    )
    output = _python(["-P", "-c", code], tmp_path, {"PYTHONPATH": str(tmp_path)})
    for path in output.split():
        assert Path(path).is_relative_to(tmp_path), path
    assert Path(output.split()[-1]).is_dir()


def test_console_script_of_the_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (installed,) = distributions(path=[str(tmp_path)])
    (script,) = installed.entry_points.select(group="console_scripts", name="quire")
    code = f"from {script.module} import {script.attr} as main; main()"
    output = _python(["-P", "-c", code, "--version"], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert output == f"quire {installed.version}\n"


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PACKAGES, "configs"])
def test_no_folder_is_importable_by_its_bare_name(name: str, tmp_path: Path) -> None:
    """transformers looks for a package `kernels`, and would take our folder for it."""
    assert _is_foreign(getattr(find_spec(name), "origin", None)), "pytest put our root on sys.path"
    code = (
        f"from importlib.util import find_spec; print(getattr(find_spec({name!r}), 'origin', ''))"
    )
    script = tmp_path / "console_script.py"
    script.write_text(code)
    # As the console script runs (its own folder first) and as the engine process does (-P).
    for arguments in ([str(script)], ["-P", "-c", code]):
        assert _is_foreign(_python(arguments, ROOT).strip() or None), arguments


def _is_foreign(origin: str | None) -> bool:
    return origin is None or "site-packages" in Path(origin).parts


def _python(arguments: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PATH": "", "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# -- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _modules("kernels"), ids=_name)
def test_kernels_import_only_tensor_libraries(path: Path) -> None:
    allowed = {"torch", "triton", "numpy", "quire.kernels"} | sys.stdlib_module_names
    if "cpu" in path.parts:
        allowed |= {"numba", "llvmlite", "tqdm"}
    assert _roots(path) <= allowed


@pytest.mark.parametrize("path", _modules("engine"), ids=_name)
def test_engine_imports_no_http(path: Path) -> None:
    assert not _roots(path) & (WEB | {"structlog", "quire.server", "quire.configs"})


FOLLOWERS = {"messages", "leader", "follower", "follower_process", "launch", "host"}
"""Modules of engine/parallel that only a model on several devices needs."""


@pytest.mark.parametrize("path", _modules("engine"), ids=_name)
def test_only_the_process_boundary_needs_messaging(path: Path) -> None:
    """The rest runs on a bare GPU machine, without pyzmq and msgspec."""
    is_follower = path.parent.name == "parallel" and path.stem in FOLLOWERS
    is_link = path.parent.name in ("process", "events", "network") or path.stem == "network_client"
    if not is_link and not is_follower:
        assert not _roots(path) & IPC


@pytest.mark.parametrize("path", _modules("server"), ids=_name)
def test_server_never_reaches_the_kernels(path: Path) -> None:
    assert not _roots(path) & {"quire.kernels", "torch", "triton"}


def test_policy_imports_no_torch() -> None:
    paths = [path for folder in POLICY for path in sorted((ROOT / folder).glob("*.py"))]
    modules = [f"quire.{_name(path).replace('/', '.')}" for path in paths]
    assert len(modules) > 20
    code = (
        f"import sys, {', '.join(modules)}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert _python(["-P", "-c", code], ROOT).split() == ["False", "False"]


# -- dependencies ----------------------------------------------------------------------------


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    extras = {
        ROOT / folder: {
            canonicalize_name(Requirement(text).name)
            for name in names
            for text in project["optional-dependencies"][name]
        }
        for folder, names in {
            "server/bench": ["bench"],
            "engine/checkpoints": ["gguf", "quantized"],
            "engine/model": ["gguf", "quantized"],
            "server/tracing": ["otel"],
            "server/ray_app": ["ray"],
        }.items()
    }
    distributions = packages_distributions()
    missing = {}
    for path in (path for package in PACKAGES for path in _modules(package)):
        for root in _roots(path) - set(sys.stdlib_module_names):
            if not root.startswith("quire"):
                names = {canonicalize_name(name) for name in distributions.get(root, [root])}
                if not names & (declared | extras.get(path.parent, set())):
                    missing[root] = path.name
    assert missing == {}


# -- tools -----------------------------------------------------------------------------------


def test_commit_hooks_name_files_that_exist() -> None:
    _python(["-P", "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"], ROOT)
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    paths = re.findall(r"tests/\S+", text)
    assert paths and all((ROOT / path).is_file() for path in paths)
