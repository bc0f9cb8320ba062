"""The log as JSON, one object per line, for the engine's process and for the server's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["console", "json"]


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
