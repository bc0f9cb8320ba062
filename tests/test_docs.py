"""Compare the other documents with the code: links, flags, files, rooms, tests and metrics."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quire.server.about import quire_version
from quire.server.cli import build_parser
from quire.server.foreign_flags import FOREIGN_FLAGS
from quire.server.settings import Settings

from . import test_rooms
from .documents import DOCUMENTS, ROOT, code, tables
from .sources import tree_of
from .test_docker import exported_samples

# -- all documents ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_flags_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), target
    (commands,) = (
        action.choices for action in build_parser()._actions if isinstance(action.choices, dict)
    )
    known = {
        flag
        for name in ("serve", "plan", "deploy")
        for flag in commands[name]._option_string_actions
    }
    if path.name == "migrating.md":
        known |= {each.flag for each in FOREIGN_FLAGS}
    shown = re.findall(r"(?:quire serve|ARGS=)[^\n`]*", text)
    flags = {flag for line in shown for flag in re.findall(r"--[a-z][a-z-]+", line)}
    flags |= set(re.findall(r"`(--[a-z][a-z-]+)`", text)) - {"--profile", "--scale"}
    assert flags <= known, flags - known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    folders = "server|engine|kernels|tests|configs|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


# -- rooms -----------------------------------------------------------------------------------

ROOMS = sorted(
    str(path.parent.relative_to(ROOT))
    for package in ("server", "engine", "kernels")
    for path in (ROOT / package).rglob("__init__.py")
)


def test_the_architecture_is_short() -> None:
    """It may have 70 lines, and a row for each room."""
    lines = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("|")]) <= 70


def test_every_room_has_its_row_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (rows,) = (table for table in tables(text) if "room" in table[0])
    assert sorted(code(row["room"]) for row in rows) == ROOMS
    for row in rows:
        assert row["what it is"] and row["may import"], row
        room = code(row["room"]).replace("/", ".")
        always, _, lazily = row["may import"].partition("; lazily ")
        doors = {target for source, target in test_rooms.LAZY if source == room}
        assert _rooms(room, always) == test_rooms.RULES[room] - {room} - doors, row
        assert _rooms(room, lazily or "nothing") == doors, row
        if row["begin at"]:
            assert (ROOT / code(row["room"]) / code(row["begin at"])).is_file(), row
        else:
            assert not _modules(code(row["room"])), row


def _rooms(room: str, text: str) -> set[str]:
    """Return the rooms in the last cell of a room's row, as explained above the table."""
    top = room.split(".")[0]
    rooms: set[str] = set()
    for item in text.split(", "):
        name = item.removesuffix(" and its")
        if name in ("words", "ground"):
            words = test_rooms.ENGINE if room != "engine.layers" else {"engine"}
            rooms |= words if name == "words" else words | {"server"}
        elif name != "nothing":
            is_path = "/" in name or name == "kernels"
            rooms.add(found := name.replace("/", ".") if is_path else f"{top}.{name}")
            rooms |= test_rooms.RULES[found] if name != item else set()
    return rooms


def test_the_recipe_for_a_device_names_what_a_backend_implements() -> None:
    tree = ast.parse((ROOT / "engine/devices/backend.py").read_text(encoding="utf-8"))
    (backend,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Backend"
    )
    text = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("**A backend (device).**")[1]
    )
    methods = [node.name for node in backend.body if isinstance(node, ast.FunctionDef)]
    assert methods and not [name for name in methods if f"`{name}`" not in text]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_describes_itself_and_names_its_files(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text("utf-8"))) or ""
    unnamed = [name for name in _modules(room) if not re.search(rf"\b{name}\b", docstring)]
    assert docstring and not unnamed


def _modules(room: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / room).glob("*.py") if path.stem != "__init__")


# -- CHANGELOG.md ----------------------------------------------------------------------------


def test_changelog_describes_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.M)
    assert newest and newest[1] == quire_version()


# -- docs/faults.md --------------------------------------------------------------------------


def test_faults_name_tests_that_exist() -> None:
    tests = {
        name: path.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text("utf-8"), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text("utf-8")))
    assert len(named) > 50
    assert named <= tests.keys()
    assert {name for name, file in tests.items() if file == "test_faults.py"} <= named


# -- docs/operations.md ----------------------------------------------------------------------

OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def _number(text: str) -> float | None:
    match = re.search(r"\d+(\.\d+)?", text)
    return float(match[0]) if match else None


def test_listed_limits_equal_the_settings() -> None:
    (rows,) = (table for table in tables(OPERATIONS) if "flag" in table[0])
    checked = 0
    for row in rows:
        if row["flag"].startswith("`") and row["default"] != "the model's":
            default = Settings.model_fields[code(row["flag"])[2:].replace("-", "_")].default
            assert _number(row["default"]) == (None if default is None else _number(str(default)))
            checked += 1
    assert checked > 5


def test_alerts_are_listed_with_what_to_do() -> None:
    alerts = re.findall(r"alert: (\w+)", (ROOT / "configs/prometheus/alerts.yml").read_text())
    cells = re.findall(r"^\| (Quire[\w, ]+) \|", OPERATIONS, re.M)
    assert [name for cell in cells for name in cell.split(", ")] == alerts


def test_listed_metrics_are_exported() -> None:
    exported = exported_samples()
    names = re.findall(r"`(quire:\w+|http_\w+)`", OPERATIONS)
    assert names
    for name in names:
        assert {name, f"{name}_count"} & exported.keys(), name


def test_every_log_event_is_listed_with_its_fields() -> None:
    (rows,) = (table for table in tables(OPERATIONS) if {"event", "fields"} <= table[0].keys())
    listed: dict[str, set[str]] = {}
    for row in rows:
        names = re.findall(r"`(\w+)`", row["event"])
        fields = row["fields"].split("; ")
        for name, its_fields in zip(names, fields, strict=True):
            listed[name] = set(its_fields.split(", "))
    logged: dict[str, set[str]] = {}
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "log":
                assert isinstance(node.args[0], ast.Constant)
                fields_ = {str(keyword.arg).removeprefix("exc_") for keyword in node.keywords}
                fields_ = {"exception" if name == "info" else name for name in fields_}
                logged.setdefault(str(node.args[0].value), set()).update(fields_)
    assert listed == logged
