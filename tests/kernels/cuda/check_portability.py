"""Check that docs/portability.md says what the installed Triton compiles: `make portability`."""

import re
import sys
from pathlib import Path

import triton

sys.path.append(str(Path(__file__).parents[1]))
from portability import table  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "portability.md"


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each launch in the table of the installed Triton."""
    head = f"| launch (triton {triton.__version__}) |"
    assert head in text, f"docs/portability.md has no table of triton {triton.__version__}"
    lines = text[text.index(head) :].splitlines()
    lines = lines[: lines.index("")] if "" in lines else lines
    return {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines[2:])}


def test_the_page_is_current() -> None:
    """Spills and shared memory must be equal, and registers within 8."""
    have, want = rows(table()), rows(PAGE.read_text(encoding="utf-8"))
    assert have.keys() == want.keys()
    for name, cells in have.items():
        for found, written in zip(cells, want[name], strict=True):
            registers, *others = re.split(r"(?<=\d)(?=\D)", found.strip(), maxsplit=1)
            expected, *rest = re.split(r"(?<=\d)(?=\D)", written.strip(), maxsplit=1)
            assert others == rest, (name, found, written)
            assert abs(int(registers) - int(expected)) <= 8, (name, found, written)


def test_everything_fits() -> None:
    assert "**" not in "".join("".join(cells) for cells in rows(PAGE.read_text()).values())
