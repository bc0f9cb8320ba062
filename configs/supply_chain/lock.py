"""Write the lock files: every package of the image, with the SHA-256 digests of its files on PyPI.

    make lock

`requirements.lock` holds what every image has. `requirements-cuda.lock` holds PyTorch as PyPI has
it, which is built for CUDA, with what only it needs. The CPU's build of PyTorch is on an index of
its own and has no lock: it is pinned by its version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = "3.12"
"""The Python of the image."""
EXTRAS = ("gguf", "quantized")
"""Optional dependencies that the image has."""
OF_CUDA = re.compile(r"torch|triton|cuda-|nvidia-")
"""Packages that only builds of PyTorch for CUDA need."""
HEAD = "# Written by `make lock`. Every file that may be installed is listed with its digest.\n"


def main() -> None:
    """Resolve the requirements, and write both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--universal"),
        *("--python-version", PYTHON, "--constraints", "configs/constraints.txt"),
        *("--generate-hashes", "--no-header", "--no-annotate"),
    ]
    result = subprocess.run(
        command, cwd=ROOT, input="\n".join(wanted), stdout=subprocess.PIPE, text=True, check=True
    )
    common, cuda = HEAD, HEAD
    # An entry is a line that names a package, and those of its digests, which are indented.
    for entry in re.findall(r"^\S.*\n(?:[ \t].*\n)*", result.stdout, re.MULTILINE):
        if OF_CUDA.match(entry):
            cuda += entry
        else:
            common += entry
    (HERE / "requirements.lock").write_text(common, encoding="utf-8")
    (HERE / "requirements-cuda.lock").write_text(cuda, encoding="utf-8")


if __name__ == "__main__":
    main()
