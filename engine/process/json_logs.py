"""What the engine's log and the server's have in common: JSON lines, and libraries' entries."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["console", "json"]


LIBRARIES = ("huggingface_hub", "transformers")
"""Libraries that print their log to stderr by handlers of their own, added when imported."""


def take_over_libraries() -> None:
    """Let the entries of LIBRARIES reach the root logger only, and so have its format.

    To be called after the libraries are imported.
    """
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


class JsonFormatter(logging.Formatter):
    """Format each record as one JSON object.

    `origin` names the process that logs; its entries appear in every object. A record may carry
    entries of its own in the attribute `fields` (`extra={"fields": {…}}`).
    """

    def __init__(self, origin: Mapping[str, object]) -> None:
        super().__init__()
        self._origin = dict(origin)

    def format(self, record: logging.LogRecord) -> str:
        timestamp = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        entry: dict[str, object] = {
            **getattr(record, "fields", {}),
            "event": record.getMessage(),
            **self._origin,
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": timestamp.isoformat(timespec="microseconds") + "Z",
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=repr)
