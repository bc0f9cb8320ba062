"""The server that `quire chat` and `quire complete` talk to: a given one, a running one, or one
that is started for the command and stopped at its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...engine.errors import StartupError
from ..settings import DEMO_MODEL_NAME, Settings
from .http_client import RequestError, Server, key_of_environment, server_at

PROBE_SECONDS = 2.0
"""Seconds that a server at the default address has to answer."""
STOP_SECONDS = 10.0
"""Seconds that a started server has to stop, before it is killed."""
_PR_SET_PDEATHSIG = 1
_NOT_INHERITED = ("QUIRE_UDS", "QUIRE_SSL_KEYFILE", "QUIRE_SSL_CERTFILE", "QUIRE_ROOT_PATH")
"""Variables that would give a started server another address."""


class Endpoint(NamedTuple):
    """A server and the name of the model to ask it for."""

    server: Server
    model: str
    is_own: bool
    """Whether the server was started for this command."""


@contextmanager
def endpoint(
    target: str | None, key: str | None, flags: Sequence[str], console: Console
) -> Iterator[Endpoint]:
    """Yield the server to ask, and stop it at the end if it was started here.

    `target` is a model, a URL, or None for whatever runs at the default address. A server is
    started if none serves the model, with `flags` as further flags of `quire serve`. `console` is
    for people. Raises StartupError.
    """
    if target is not None and target.startswith(("http://", "https://")):
        if flags:
            raise StartupError("flags after -- are for a server that is started, not for a URL")
        server = server_at(target, key or key_of_environment())
        yield Endpoint(server, _first_model(server), False)
        return
    found = None if flags else find_running(target, key, console)
    if found is not None:
        yield found
        return
    with started(target, flags, console) as server:
        yield Endpoint(server, _first_model(server), True)


def find_running(target: str | None, key: str | None, console: Console) -> Endpoint | None:
    """Return the server at the default address if it is quire's and serves the model `target`."""
    server = Server(default_address(), key or key_of_environment())
    try:
        cards = server.models(timeout=PROBE_SECONDS)
    except RequestError as error:
        if error.status == 401:
            console.print(
                f"A server at {server.url} asks for a key (--api-key, QUIRE_API_KEY).",
                style="dim",
                highlight=False,
            )
        return None
    names = [str(card["id"]) for card in cards if card.get("owned_by") == "quire"]
    wanted = names[0] if target is None and names else target
    return Endpoint(server, wanted, False) if wanted in names and wanted is not None else None


def default_address() -> str:
    """Return the address at which `quire serve` listens by the environment and its defaults."""
    fields = Settings.model_fields
    host = os.environ.get("QUIRE_HOST") or str(fields["host"].default)
    port = os.environ.get("QUIRE_PORT", "")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port if port.isdecimal() else fields['port'].default}"


@contextmanager
def started(model: str | None, flags: Sequence[str], console: Console) -> Iterator[Server]:
    """Run `quire serve` on a free port of this machine, with a key of its own, and stop it at the
    end. Raises StartupError with the server's reason if it does not start."""
    key = secrets.token_urlsafe(24)
    environment = {
        name: value for name, value in os.environ.items() if name.upper() not in _NOT_INHERITED
    }
    command = [sys.executable, "-P", "-m", "quire.server.cli", "serve"]
    command += [] if model is None else [str(_absolute(model))]
    command += ["--host", "127.0.0.1", "--port", "0", "--log-format", "json"]
    process = subprocess.Popen(
        [*command, "--log-level", "info", "--shutdown-timeout", "1", *flags],
        env={**environment, "QUIRE_API_KEY": key},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C of this terminal is not meant for the server
        preexec_fn=_die_with_parent,
    )
    drain: threading.Thread | None = None
    assert process.stderr is not None
    try:
        address = _wait_ready(process.stderr, model or DEMO_MODEL_NAME, console)
        # A server whose log nobody reads would wait for ever once the pipe is full.
        drain = threading.Thread(target=deque, args=(process.stderr, 0), daemon=True)
        drain.start()
        yield Server(address, key)
    finally:
        _stop(process)
        if drain is not None:
            drain.join()
        process.stderr.close()


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def _die_with_parent() -> None:
    """Ask Linux to stop the server if this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_ready(log: IO[str], model: str, console: Console) -> str:
    """Show what the server does until it is ready, and return its address."""
    said = ""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(f"starting {model}")
        for line in log:
            try:
                entry = json.loads(line)
            except ValueError:
                said = line.strip() or said
                continue
            if entry.get("event") == "ready":
                return str(entry["address"])
            width = max(console.width - 16, 20)
            progress.update(task, description=f"{model}: {entry.get('event', '')}"[:width])
    raise StartupError(said.removeprefix("quire: ") or f"the server of {model} ended at its start")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _first_model(server: Server) -> str:
    cards = server.models()
    if not cards:
        raise RequestError(f"{server.url} serves no model")
    return str(cards[0]["id"])
