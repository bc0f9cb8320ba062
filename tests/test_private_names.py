"""Test that docs/pins.md lists every private name of another library that the code uses.

A name is private if a part of it begins with an underscore, or if it belongs to a module that is
neither a library's top level nor in PUBLIC_MODULES. Writing to `sys.modules` counts too.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .sources import dotted, tree_of
from .test_pins import PINS, ROOT

SCANNED = ("server", "engine", "kernels")
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
"""Underscored names of the standard library that its manual documents."""
PUBLIC_MODULES = {
    *("fastapi.exceptions", "fastapi.middleware.cors", "fastapi.responses", "fastapi.security"),
    *("fastapi.routing", "jinja2.meta", "pydantic.config"),
    *(
        "msgspec.json",
        "msgspec.structs",
        "numba.extending",
        "numpy.typing",
        "prometheus_client.core",
    ),
    *("opentelemetry.context", "opentelemetry.exporter.otlp.proto.http.trace_exporter"),
    *("opentelemetry.sdk.resources", "opentelemetry.sdk.trace", "opentelemetry.sdk.trace.export"),
    *("opentelemetry.trace", "opentelemetry.trace.propagation.tracecontext"),
    *("prometheus_client.exposition", "prometheus_client.openmetrics.exposition"),
    *("prometheus_client.registry", "pydantic.fields"),
    *("pydantic.json_schema", "starlette.datastructures", "starlette.exceptions"),
    *("starlette.requests", "starlette.responses", "starlette.types", "structlog.types"),
    *("tokenizers.decoders", "torch.nn.functional", "transformers.utils", "triton.errors"),
    *("torch.distributed", "triton.language", "triton.language.extra"),
    *("ray.serve.config", "ray.serve.handle"),
    *("zmq.asyncio", "zmq.auth.thread", "zmq.utils.monitor", "zmq.utils.z85"),
    *("rich.console", "rich.progress", "rich.text", "packaging.requirements"),
    *("prompt_toolkit.completion", "prompt_toolkit.history", "prompt_toolkit.key_binding"),
    *("prompt_toolkit.output",),
}
"""Modules below a library's top level that its manual names."""


def _private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and name != "_" and not dunder and name not in DOCUMENTED


@cache
def _trees() -> dict[Path, ast.Module]:
    paths = [path for folder in SCANNED for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: tree_of(path) for path in paths}


class _Classes:
    """The names that our classes and modules define, to tell our private names from others'."""

    def __init__(self) -> None:
        self.everywhere: set[str] = set()
        self._members: dict[str, set[str]] = defaultdict(set)
        self._bases: dict[str, set[str]] = defaultdict(set)
        for tree in _trees().values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._members[node.name] |= set(_defined(node))
                    self._bases[node.name] |= {ast.unparse(base) for base in node.bases}
            self.everywhere |= set(_defined(tree))

    def has(self, class_name: str, member: str) -> bool:
        """Return whether a class of ours, or one of its bases of ours, defines a member."""
        if member in self._members.get(class_name, ()):
            return True
        bases = self._bases.get(class_name, set())
        names = (base.split("[")[0].rsplit(".", 1)[-1] for base in bases)
        return any(self.has(name, member) for name in names if name != class_name)


def _defined(scope: ast.AST) -> Iterator[str]:
    """Yield the functions, classes, variables, slots and attributes of `self` a scope defines."""
    for node in ast.walk(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if dotted(node.value) in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__slots__":
            yield from ast.literal_eval(node.value)


def _used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every private name of another library in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _imported(node.lineno, alias.name, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield from _imported(node.lineno, node.module, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Subscript) and dotted(node.value) == "sys.modules":
            if isinstance(node.ctx, ast.Store):
                yield node.lineno, f'sys.modules["{ast.literal_eval(node.slice)}"]'
        elif isinstance(node, ast.Call):
            function = dotted(node.func)
            if function == "sys.modules.setdefault":
                yield node.lineno, f'sys.modules["{ast.literal_eval(node.args[0])}"]'
            elif function in ("getattr", "setattr", "hasattr", "delattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and _private(str(name.value)):
                    yield node.lineno, str(name.value)
    yield from _attributes(tree, "")


def _imported(line: int, module: str, name: str) -> Iterator[tuple[int, str]]:
    root = module.split(".")[0]
    if root in sys.stdlib_module_names or root == "quire":
        return
    public = module == root or module in PUBLIC_MODULES
    if not public or any(map(_private, name.split("."))):
        yield line, name


def _attributes(node: ast.AST, class_name: str) -> Iterator[tuple[int, str]]:
    """Yield private attributes that are not ours.

    An attribute of `self` must be defined by its own class, any other by some class of ours.
    """
    if isinstance(node, ast.ClassDef):
        class_name = node.name
    if isinstance(node, ast.Attribute) and _private(node.attr):
        if dotted(node.value) in ("self", "cls") and class_name:
            ours = _classes().has(class_name, node.attr)
        else:
            ours = node.attr in _classes().everywhere
        if not ours:
            yield node.lineno, node.attr
    for child in ast.iter_child_nodes(node):
        yield from _attributes(child, class_name)


@cache
def _classes() -> _Classes:
    return _Classes()


def _is_pinned(name: str, path: Path) -> bool:
    """Return whether a file may use a name.

    The scan finds attributes without their owners, so the last part of a pin's name is enough.
    """
    return any(
        path in files and name in (pin, pin.rsplit(".", 1)[-1]) for pin, files in PINS.items()
    )


def test_every_private_name_that_the_code_uses_is_listed() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in _trees().items()
        for line, name in _used(tree)
        if not _is_pinned(name, path)
    ]
    assert missing == [], "add each to docs/pins.md and test_pins.py, or use a public name"


def test_the_scan_finds_private_names() -> None:
    tree = ast.parse(
        "import sys\nimport numba.core.other\nfrom h11 import _private_thing\n"
        "from torch.nn import Linear\nsys.modules['a'] = None\nsys.modules.setdefault('b', None)\n"
        "getattr(model, '_hidden', None)\nmodel._buffers_of_torch\npoint._replace(x=1)\n"
        "class GuardedH11Protocol(Base):\n"
        "    def f(self):\n        self._timer.cancel()\n        self._modules\n"
    )
    assert [name for _, name in _used(tree)] == [
        *("numba.core.other", "h11._private_thing", "torch.nn.Linear"),
        *('sys.modules["a"]', 'sys.modules["b"]', "_hidden", "_buffers_of_torch", "_modules"),
    ]
