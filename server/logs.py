"""Configures one log for everything: structlog and the standard library's loggers, to stderr."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.types import EventDict, Processor

LogFormat = Literal["console", "json"]


def resolve_format(log_format: Literal["auto", "console", "json"]) -> LogFormat:
    """Return the format of the log: `auto` is console on a terminal and JSON elsewhere."""
    if log_format == "auto":
        return "console" if sys.stderr.isatty() else "json"
    return log_format


def configure_logging(level: str, log_format: LogFormat, worker: int | None = None) -> None:
    """Log entries of at least `level` as key=value lines or JSON objects.

    Replaces any earlier configuration. Entries carry the number of the HTTP `worker`, if given.
    """

    def add_worker(logger: object, name: str, entry: EventDict) -> EventDict:
        return entry if worker is None else {**entry, "worker": worker}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_worker,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    ending: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if log_format == "json":
        ending += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    else:
        ending.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=0,
                exception_formatter=structlog.dev.plain_traceback,
            )
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=ending)
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # uvicorn's messages about starting and stopping repeat our own.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
