"""Imports transformers without torch, for processes that only tokenise."""

from __future__ import annotations

import logging
import sys


def import_transformers() -> None:
    """Import transformers in such a way that it takes torch to be absent from this process.

    torch is hidden by `sys.modules["torch"] = None` while transformers is imported, and the entry
    is removed right after. None is Python's own mark for a module that cannot be imported.
    transformers asks importlib for torch only once, on import, and remembers the answer; any other
    code can still import torch later.

    The reason is that tokenizers do not need torch, but transformers imports it if it is there,
    which takes seconds and more memory than the rest of the process. Release 5 has no setting to
    prevent it.

    Does nothing if transformers or torch has been imported already.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    # transformers logs the advice to install PyTorch, through this logger only.
    logger = logging.getLogger("transformers")
    logger.addFilter(_drop)
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import transformers  # noqa: F401
    finally:
        del sys.modules["torch"]
        logger.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False
