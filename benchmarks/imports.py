"""Count how the modules and rooms import each other, as a table for docs/decisions.md.

    python benchmarks/imports.py            # this checkout
    python benchmarks/imports.py OTHER      # another checkout, to compare

The script uses only the standard library and does not import the measured code. Each pair of
importer and imported counts once, lazy and type-only imports included. A module's level is one more
than the highest level that it imports; members of a circle share a level. The words on a package's
top level count as a room. The rooms' columns omit DOORS, which lazily import the room they choose.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("server", "engine", "kernels")
DOORS = ("server.cli", "engine.devices.choose")


def edges(root: Path, package: str) -> set[tuple[str, str]]:
    """Yield pairs of modules of one package, as dotted names; the first imports the second."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in (root / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    found = set()
    for name, path in paths.items():
        for target in _imports(name, ast.parse(path.read_text(encoding="utf-8"))):
            # `from .room import module` names a module, `from .module import name` does not.
            for candidate in (target, target.rpartition(".")[0]):
                if candidate in paths and candidate != name:
                    found.add((name, candidate))
                    break
    return found


def _imports(name: str, tree: ast.Module) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name])


def rooms(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs of different rooms. A module's room is its folder."""
    inside = ((a, b) for a, b in pairs if a not in DOORS)
    found = {(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in inside}
    return {(a, b) for a, b in found if a != b}


class Graph:
    """A directed graph that knows its circles and levels."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._targets: dict[str, set[str]] = defaultdict(set)
        nodes = set()
        for source, target in pairs:
            self._targets[source].add(target)
            nodes |= {source, target}
        reached = {node: self._reach(node) for node in nodes}
        self._circle = {
            node: frozenset({node} | {other for other in reached[node] if node in reached[other]})
            for node in nodes
        }
        self._level = cache(self._compute_level)

    def _reach(self, node: str) -> set[str]:
        found: set[str] = set()
        stack = [node]
        while stack:
            new = self._targets[stack.pop()] - found
            found |= new
            stack += new
        return found

    def _compute_level(self, circle: frozenset[str]) -> int:
        below = {self._circle[target] for node in circle for target in self._targets[node]}
        return 1 + max(map(self._level, below - {circle}), default=0)

    @property
    def levels(self) -> int:
        """Return the number of levels."""
        return max(map(self._level, self._circle.values()), default=1)

    @property
    def circles(self) -> int:
        """Return the number of groups whose members import each other, directly or not."""
        return len({circle for circle in self._circle.values() if len(circle) > 1})


def table(root: Path) -> str:
    """Return the counts as a Markdown table."""
    lines = [
        "| | modules: imports | levels | circles | rooms: imports | levels | circles |",
        "|---|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        cells = []
        modules = edges(root, package)
        for pairs in (modules, rooms(modules)):
            graph = Graph(pairs)
            cells += [len(pairs), graph.levels, graph.circles]
        lines.append(f"| {package} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of the checkout that is named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=here, help="the checkout to measure")
    print(table(parser.parse_args().root))


if __name__ == "__main__":
    main()
