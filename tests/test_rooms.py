"""Test which rooms may import which, and that no imports form a circle.

Every import counts alike: at the top of a file, within a function, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ENGINE = {"engine", "engine.layers"}
KERNELS = {"kernels"}
RULES: dict[str, set[str]] = {
    "kernels": set(),
    "kernels.cpu": KERNELS,
    "kernels.cpu.integer": KERNELS | {"kernels.cpu"},
    "kernels.cpu.latent": {"kernels.cpu"},
    "kernels.cpu.lora": {"kernels.cpu"},
    "kernels.cpu.states": {"kernels.cpu"},
    "kernels.cuda": KERNELS,
    "kernels.cuda.attention": KERNELS | {"kernels.cuda"},
    "kernels.cuda.sampling": KERNELS | {"kernels.cuda"},
    "kernels.cuda.states": KERNELS | {"kernels.cuda"},
    "engine": {"engine.flags", "engine.layers"},
    "engine.flags": ENGINE,
    "engine.layers": {"engine"},
    "engine.events": ENGINE,
    "engine.cache": ENGINE | {"engine.events"},
    "engine.checkpoints": ENGINE | {"engine.body"},
    "engine.grammar": ENGINE | {"engine.checkpoints"},
    "engine.speculation": ENGINE | {"engine.cache"},
    "engine.tiers": ENGINE | {"engine.cache"},
    "engine.scheduling": ENGINE | {"engine.cache", "engine.speculation", "engine.tiers"},
    "engine.core": ENGINE
    | {"engine.cache", "engine.events", "engine.grammar"}
    | {"engine.scheduling", "engine.speculation", "engine.tiers"},
    "engine.states": ENGINE,
    "engine.attention": ENGINE | KERNELS | {"engine.states"},
    "engine.body": ENGINE | KERNELS | {"engine.attention"},
    "engine.adapters": ENGINE | {"engine.body"},
    "engine.sampling": ENGINE | KERNELS,
}
RULES["engine.devices"] = (
    ENGINE
    | KERNELS
    | {
        *("engine.attention", "engine.body", "engine.adapters", "engine.sampling"),
        "engine.states",
    }
)
RULES["engine.devices.cpu"] = RULES["engine.devices"] | {
    *("engine.devices", "kernels.cpu", "kernels.cpu.integer", "kernels.cpu.lora"),
    *("kernels.cpu.latent", "kernels.cpu.states"),
}
RULES["engine.devices.cuda.layers"] = RULES["engine.devices"] | {
    *("engine.devices", "kernels.cuda", "kernels.cuda.attention", "kernels.cuda.sampling"),
    "kernels.cuda.states",
}
RULES["engine.devices.cuda"] = RULES["engine.devices.cuda.layers"] | {"engine.devices.cuda.layers"}
RULES["engine.parallel"] = RULES["engine.devices"] | {"engine.devices", "engine.network"}
RULES["engine.model"] = RULES["engine.parallel"] | {"engine.parallel", "engine.checkpoints"}
RULES["engine.runner"] = RULES["engine.model"] | {"engine.model"}
RULES["engine.network"] = ENGINE
RULES["engine.process"] = ENGINE | {"engine.events", "engine.network"}
RULES["engine.fleet"] = RULES["engine.process"] | {"engine.process", "engine.cache"}
RULES["engine.plan"] = (
    RULES["engine.core"]
    | RULES["engine.fleet"]
    | {
        *("engine.core", "engine.fleet"),
    }
)
RULES["engine.bench"] = ENGINE | {"engine.core", "engine.flags"}
GROUND = ENGINE | {"server"}
RULES["server"] = GROUND | {
    *("server.serving", "server.bench", "server.commands", "server.ray_app"),
    *("engine.bench", "engine.events", "engine.process"),
}
RULES["server.templates"] = GROUND
RULES["server.text"] = GROUND | {"engine.grammar", "server.templates"}
RULES["server.parsing"] = RULES["server.text"] | {"server.text"}
RULES["server.parsing.formats"] = RULES["server.parsing"] | {"server.parsing"}
RULES["server.metrics"] = GROUND | {"engine.process"}
RULES["server.tenants"] = GROUND | {"server.metrics"}
RULES["server.http"] = RULES["server.parsing.formats"] | {
    *("server.parsing.formats", "server.tenants", "server.metrics", "engine.process"),
}
RULES["server.tracing"] = GROUND | {"server.metrics"}
RULES["server.requests"] = RULES["server.http"] | {"server.http", "server.tracing"}
RULES["server.api"] = RULES["server.requests"] | {"server.requests"}
RULES["server.dialects"] = RULES["server.api"] | {"server.api"}
RULES["server.scoring"] = RULES["server.dialects"]
RULES["server.live"] = RULES["server.api"]
RULES["server.serving"] = RULES["server.dialects"] | {
    *("server.dialects", "server.scoring", "server.live", "engine.checkpoints", "engine.fleet"),
    "engine.parallel",
}
RULES["server.ray_app"] = RULES["server.serving"] | {
    *("server.serving", "engine.fleet", "engine.network"),
}
RULES["server.web"] = set()
RULES["server.bench"] = GROUND | {"engine.bench", "engine.plan"}
RULES["server.commands"] = GROUND | {"server.text", "engine.checkpoints", "engine.model"}
"""Room → the other rooms that its modules may import."""

LAZY = {
    ("kernels.cpu", "kernels.cpu.integer"): {"kernels.cpu.ahead"},
    ("server", "server.serving"): {"server.cli"},
    ("server", "server.bench"): {"server.cli"},
    ("server", "server.ray_app"): {"server.cli"},
    ("server", "engine.bench"): {"server.cli"},
    ("server", "server.commands"): {"server.cli"},
    ("server.commands", "server.text"): {"server.commands.models"},
    ("server.commands", "engine.model"): {"server.commands.models"},
    ("server.commands", "engine.checkpoints"): {
        *("server.commands.models", "server.commands.completion", "server.commands.doctor_checks"),
    },
    ("engine.process", "engine.core"): {"engine.process.engine_process"},
    ("engine.process", "engine.runner"): {"engine.process.engine_process"},
    ("engine.process", "engine.devices"): {"engine.process.engine_process"},
    ("engine.parallel", "engine.process"): {
        *("engine.parallel.leader", "engine.parallel.follower_process"),
    },
    ("engine.parallel", "engine.runner"): {"engine.parallel.follower_process"},
    ("engine.bench", "engine.runner"): {"engine.bench.commands"},
    ("server.bench", "engine.runner"): {"server.bench.planning"},
    ("server.bench", "engine.model"): {"server.bench.planning"},
    ("server.bench", "server.text"): {"server.bench.planning"},
    ("engine.devices.cpu", "engine.checkpoints"): {"engine.devices.cpu.first_start"},
    ("engine.devices", "engine.devices.cpu"): {"engine.devices.choose"},
    ("engine.devices", "engine.devices.cuda"): {"engine.devices.choose"},
    ("engine.devices", "engine.devices.cuda.layers"): {"engine.devices.choose"},
}
"""Imports against the order or of a heavy room; only these modules have them, within functions."""


def _modules() -> dict[str, Path]:
    found = {}
    for top in ("server", "engine", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    return ".".join(MODULES[module].parent.relative_to(ROOT).parts)


def _imports(module: str) -> dict[str, bool]:
    """Return the modules of ours that a module imports.

    The value is true if the import runs when the module itself is imported: outside of functions,
    and not for types only.
    """
    package = MODULES[module].parent.relative_to(ROOT).parts
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    within = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        name = ".".join(filter(None, base))
        for alias in node.names:
            target = f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name
            assert target in MODULES, f"{module} imports {target}, which is not there"
            found[target] = found.get(target, False) or id(node) not in within
    return found


IMPORTS = {module: _imports(module) for module in MODULES}


def test_each_room_has_its_rule() -> None:
    assert RULES.keys() == {_room(module) for module in MODULES}


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_what_its_rule_allows(room: str) -> None:
    for module in (module for module in MODULES if _room(module) == room):
        for target, is_eager in IMPORTS[module].items():
            edge = (room, _room(target))
            if edge in LAZY:
                assert module in LAZY[edge] and not is_eager, f"{module} imports {target}"
            else:
                assert edge[1] in RULES[room] | {room}, f"{module} imports {target}"


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in IMPORTS[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_our_own_modules_are_imported_relatively() -> None:
    """An absolute import would escape the rules above."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "quire" for name in names), path


def test_rooms_are_not_crowded() -> None:
    counts: dict[str, int] = {}
    for module in MODULES:
        counts[_room(module)] = counts.get(_room(module), 0) + 1
    crowded = {room: count - 1 for room, count in counts.items() if count - 1 > 14}
    assert crowded == {}


# -- lengths ---------------------------------------------------------------------------------


def test_no_file_is_over_400_lines() -> None:
    long = {str(path): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: count for name, count in long.items() if count > 400} == {}


@pytest.mark.parametrize("top", ["server", "engine", "kernels"])
def test_a_function_over_50_lines_says_why(top: str) -> None:
    """The reason stands in a comment that begins with "over 50 lines", above it or within it."""
    silent = []
    for path in (ROOT / top).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            last = node.end_lineno or first
            if last - node.lineno + 1 > 50:
                around = "\n".join(lines[max(first - 3, 0) : last])
                if "# over 50 lines" not in around.lower():
                    silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert silent == []
