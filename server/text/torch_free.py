"""transformers without torch, for processes that only tokenise."""

from __future__ import annotations

import logging
import sys


def import_transformers() -> None:
    """Import transformers so that it takes torch for absent in this process, from now on.

    Its tokenizers do not need torch, but import it where they see it: seconds, and more memory than
    the rest of the process. Release 5 has no setting against that; it asks importlib once, when it
    is imported, and remembers the answer. None in sys.modules is Python's own way to say that a
    module is not there, and it is taken back at once. Whoever else imports torch here still gets
    it. Without effect where transformers or torch is imported already.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    # It advises to install PyTorch, in the name of this logger alone.
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
