"""Measure the lengths of files, functions and classes, as a table for docs/decisions.md.

    python benchmarks/lengths.py            # this checkout
    python benchmarks/lengths.py OTHER      # another checkout, to compare

The script uses only the standard library and does not import the measured code. The columns:

- A file's length is its physical lines. A function or class is measured from its `def` or `class`
  to its end, with its docstring, without its decorators. Nested functions also count on their own.
- p95 is the 95th percentile by the nearest rank.
- The share of public docstrings counts functions, methods and classes without a leading underscore,
  unless an enclosing function or private class hides them.
- Comment lines are lines that hold nothing but a comment.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ("server", "engine", "kernels", "tests", "benchmarks")
SOURCE = FOLDERS[:3]
LIMIT = 50
COLUMNS = (
    "files / lines",
    "file median / p95 / max",
    "functions",
    "function median / p95 / max",
    f"over {LIMIT} lines",
    "public docstrings",
    "comment lines",
    "largest class",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Lengths:
    """Lengths and counts of a set of files."""

    files: list[int] = field(default_factory=list)
    """Lines per file."""
    functions: list[int] = field(default_factory=list)
    """Lines per function."""
    classes: list[tuple[int, str]] = field(default_factory=list)
    """Lines and name per class."""
    documented: list[bool] = field(default_factory=list)
    """Whether each public function, method or class has a docstring."""
    comment_lines: int = 0

    def add(self, other: Lengths) -> None:
        """Add the counts of other files to these."""
        self.files += other.files
        self.functions += other.functions
        self.classes += other.classes
        self.documented += other.documented
        self.comment_lines += other.comment_lines

    def row(self) -> tuple[str, ...]:
        """Return the cells of COLUMNS."""
        over = sum(length > LIMIT for length in self.functions)
        largest = max(self.classes, default=(0, "–"))
        return (
            f"{len(self.files)} / {sum(self.files):,}",
            _spread(self.files),
            f"{len(self.functions):,}",
            _spread(self.functions),
            f"{over} ({_percent(over, len(self.functions))})",
            _percent(sum(self.documented), len(self.documented)),
            _percent(self.comment_lines, sum(self.files)),
            f"{largest[1]} {largest[0]}",
        )


def measure(path: Path) -> Lengths:
    """Count one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lengths = Lengths(files=[len(text.splitlines())])
    for node in ast.walk(tree):
        if isinstance(node, Function):
            lengths.functions.append(_length(node))
        elif isinstance(node, ast.ClassDef):
            lengths.classes.append((_length(node), node.name))
    lengths.documented = [ast.get_docstring(node) is not None for node in _public(tree)]
    lengths.comment_lines = sum(
        token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    return lengths


def _public(parent: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in parent.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def _length(node: Function | ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    ranks = (math.ceil(share * len(ordered)) - 1 for share in (0.5, 0.95, 1))
    return " / ".join(str(ordered[max(0, rank)]) if ordered else "–" for rank in ranks)


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else "–"


def measure_checkout(root: Path) -> dict[str, Lengths]:
    """Count each folder of a checkout, and the source as a whole. Links are not followed."""
    folders = {name: Lengths() for name in FOLDERS}
    for name, lengths in folders.items():
        for path in sorted((root / name).rglob("*.py")):
            # tests/types holds links to the source, for the type checker.
            if path.is_relative_to(root / "tests/types"):
                continue
            lengths.add(measure(path))
    source = Lengths()
    for name in SOURCE:
        source.add(folders[name])
    return {name: folders[name] for name in SOURCE} | {"all": source} | folders


def table(rows: dict[str, Lengths]) -> str:
    """Return the lengths as a Markdown table."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(lengths.row()) + " |" for name, lengths in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the table of the checkout that is named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=here, help="the checkout to measure")
    print(table(measure_checkout(parser.parse_args().root)))


if __name__ == "__main__":
    main()
