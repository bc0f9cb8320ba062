"""The listening socket of `quire serve`: TCP or unix, its address, and the check of TLS files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator

from ...engine.errors import ConfigurationError
from ..settings import Settings

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""


def check_tls(settings: Settings) -> None:
    """Raise ConfigurationError if the TLS files cannot be loaded."""
    if settings.ssl_certfile is None or settings.ssl_keyfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile
        )
    except OSError as error:
        raise ConfigurationError(f"ssl_certfile, ssl_keyfile: {error}") from error


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Open the listening socket, before the model loads, so that no other process can take it."""
    if settings.uds is None:
        with _listen_tcp(settings.host, settings.port) as listener:
            yield listener
        return
    with _listen_unix(settings.uds) as listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)


def address_of(settings: Settings, listener: socket.socket) -> str:
    """Return the URL of the server, or `unix:` and the path of its socket."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.ssl_certfile else 'http'}://{host}:{port}"


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"port {port} of {host} is taken") from error
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _listen_unix(path: str) -> socket.socket:
    """Listen on a unix socket. The umask decides which users may connect."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"uds: cannot listen on {path}: {error}") from error
    except ConfigurationError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed. Raises ConfigurationError for anything else
    that exists there."""
    if not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigurationError(f"uds: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigurationError(f"uds: {path} is taken")
    os.unlink(path)
