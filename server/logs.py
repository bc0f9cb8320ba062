"""Configure the server's one log: structlog and the standard library's loggers, to stderr."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog
from structlog.types import EventDict, Processor

from ..engine.process.json_logs import JsonFormatter, LogFormat, stderr_handler


def resolve_format(log_format: Literal["auto", "console", "json"]) -> LogFormat:
    """Return the format to use: `auto` means console on a terminal and JSON elsewhere."""
    if log_format == "auto":
        return "console" if sys.stderr.isatty() else "json"
    return log_format


def configure_logging(level: str, log_format: LogFormat, worker: int | None = None) -> None:
    """Log from `level` on, as key=value lines or JSON objects. Replaces any earlier configuration.

    If there are several HTTP workers, each entry names the `worker` that writes it.
    """
    origin = {} if worker is None else {"worker": worker}
    if log_format == "json":
        formatter: logging.Formatter = JsonFormatter(origin)
        processors: list[Processor] = [
            structlog.stdlib.PositionalArgumentsFormatter(),
            _to_log_record,
        ]
    else:
        formatter, processors = _console(origin)
    structlog.configure(
        processors=processors,
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = stderr_handler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # uvicorn's own start and stop messages say nothing that ours do not.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def _to_log_record(
    logger: object, name: str, entry: EventDict
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Turn a structlog entry into the arguments of a logging call, as JsonFormatter reads them."""
    event, exc_info = entry.pop("event"), entry.pop("exc_info", None)
    return (event,), {"exc_info": exc_info, "extra": {"fields": entry}}


def _console(origin: EventDict) -> tuple[logging.Formatter, list[Processor]]:
    """Return the formatter of key=value lines, and structlog's processors for it."""

    def add_origin(logger: object, name: str, entry: EventDict) -> EventDict:
        return {**entry, **origin}

    shared: list[Processor] = [
        add_origin,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
    ]
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        pad_event_to=0,
        pad_level=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    return formatter, [*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter]
