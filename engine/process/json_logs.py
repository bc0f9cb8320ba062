"""What the engine's log and the server's have in common: JSON lines, libraries' entries, and a
handler that nobody who fails to read the log can hold up; and how a process of the engine prepares
its log and its signals."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, Protocol

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


def stderr_handler() -> logging.Handler:
    """Return a handler that writes to stderr, and never waits for its reader if it may have one: a
    pipe, a socket or a terminal."""
    try:
        descriptor = sys.stderr.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # stderr is closed, or no file
        return logging.StreamHandler(sys.stderr)
    if stat.S_ISSOCK(mode):
        return NonBlockingHandler(_socket_writer(descriptor))
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        # Opened anew, the flag is this process's own: other processes share the descriptor's.
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
            return NonBlockingHandler(_FileWriter(own))
    return logging.StreamHandler(sys.stderr)


class Writer(Protocol):
    """Writes bytes without waiting. `fileno` is what to wait on until there is room."""

    def fileno(self) -> int: ...

    def write(self, data: bytes) -> int:
        """Write what there is room for and return how much it was. Raises OSError."""

    def close(self) -> None: ...


class _FileWriter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: bytes) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        os.close(self._descriptor)


class _SocketWriter:
    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def write(self, data: bytes) -> int:
        return self._end.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        self._end.close()


def _socket_writer(descriptor: int) -> _SocketWriter:
    return _SocketWriter(socket.socket(fileno=os.dup(descriptor)))


MAX_UNWRITTEN = 256 * 1024
"""Bytes of the log that wait for a reader; later entries are dropped and counted."""
LAST_SECONDS = 1.0
"""Seconds that what waits may take to be written when the process ends."""
_FULL = {errno.EAGAIN, errno.EWOULDBLOCK}


class NonBlockingHandler(logging.Handler):
    """Writes entries to a pipe, a socket or a terminal as far as there is room.

    A log that nobody reads would hold up the event loop, and with it everybody, once the pipe is
    full. Here entries wait, up to MAX_UNWRITTEN bytes, and are dropped beyond that. The next entry
    that finds room is preceded by one that says how many are missing. If the reader has gone,
    entries are dropped silently.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer
        self._unwritten = bytearray()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = self._encode(record)
            self._flush()
            if self._dropped and len(self._unwritten) + len(data) <= MAX_UNWRITTEN:
                dropped, self._dropped = self._dropped, 0
                text = "%d log entries are missing: nobody read them in time"
                name = "quire.logs"
                lost = logging.LogRecord(name, logging.WARNING, "", 0, text, (dropped,), None)
                self._unwritten += self._encode(lost)
            if len(self._unwritten) + len(data) <= MAX_UNWRITTEN:
                self._unwritten += data
                self._flush()
            else:
                self._dropped += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits, within LAST_SECONDS."""
        with self.lock or contextlib.nullcontext():
            deadline = time.monotonic() + LAST_SECONDS
            while self._flush() and (left := deadline - time.monotonic()) > 0:
                select.select([], [self._writer], [], left)

    def close(self) -> None:
        self._writer.close()
        super().close()

    def _encode(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"

    def _flush(self) -> bool:
        """Write what there is room for. Return whether something still waits."""
        while self._unwritten:
            try:
                written = self._writer.write(bytes(self._unwritten[:65536]))
            except OSError as error:
                if error.errno not in _FULL:
                    self._unwritten.clear()  # there is no reader any more
                break
            del self._unwritten[:written]
        return bool(self._unwritten)


def prepare_process(log_level: str, log_format: LogFormat, source: str) -> QuietStart:
    """Set up signals, crash dumps, and the log, whose entries name their `source`. Return what
    keeps the log of the start short."""
    quiet = QuietStart(log_format == "console" and log_level == "info")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, too
    if log_format == "json" or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are no lines of a log
    # A terminal's Ctrl-C reaches the whole process group, but the client decides when to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    handler = stderr_handler()
    handler.setFormatter(_formatter(log_format, source))
    handler.addFilter(quiet)
    if quiet.is_on:
        # Bars vanish when they are full. tqdm reads its defaults from such variables.
        os.environ.setdefault("TQDM_LEAVE", "")
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    return quiet


class QuietStart(logging.Filter):
    """Keeps what the start does from a terminal, where progress bars and the server's own summary
    tell a person enough; warnings pass. `--log-level debug` shows all of it."""

    def __init__(self, is_on: bool) -> None:
        super().__init__()
        self.is_on = is_on

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.is_on or record.levelno > logging.INFO


class _ConsoleFormatter(logging.Formatter):
    """Format records as the server's console log does: in UTC, with the level in lower case."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        record.lower = record.levelname.lower()
        return super().format(record)


def _formatter(log_format: LogFormat, source: str) -> logging.Formatter:
    if log_format == "json":
        return JsonFormatter({"source": source})
    return _ConsoleFormatter(
        "%(asctime)s [%(lower)s] %(message)s [%(name)s]", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )
