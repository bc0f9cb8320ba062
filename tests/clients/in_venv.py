"""Run a module of this folder as a program of .venv, for tests of another environment.

`python -P in_venv.py MODULE ARGUMENTS` imports it as pytest does, without the repository on the
import path, where transformers would take the folder `kernels` for a package of that name.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path


def main() -> None:
    """Import the module that the first argument names, and call its `main` with the others."""
    package = types.ModuleType("tests")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["tests"] = package
    importlib.import_module(f"tests.clients.{sys.argv[1]}").main(*sys.argv[2:])


if __name__ == "__main__":
    main()
