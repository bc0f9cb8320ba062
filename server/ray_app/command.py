"""`quire deploy`: deploy to a Ray cluster, or to one of this machine that ends with the command."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import yaml

from ...engine.errors import StartupError
from ..about import install_extra
from ..settings import Settings
from .options import SECRETS, DeployOptions, as_arguments, read_flags

NAME = "quire"
"""The name of the application in the cluster."""
IMPORT_PATH = "quire.server.ray_app.application:build"
"""What a configuration for `serve deploy` imports."""

_HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Variable that turns HAProxy on: an event takes a quarter of the default proxy's time. It opens
the fronts' ports on all interfaces."""
_ENVIRONMENT = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # nobody balances over one machine
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables of a local cluster that are not set."""


def run(flags: Mapping[str, Any]) -> int:
    """Run the command and return its exit code. Raises StartupError."""
    flags = dict(flags)
    address, only_print = flags.pop("ray_address", None), flags.pop("print", False)
    options, settings = read_flags(flags)
    if only_print:
        print(configuration(options, settings), end="")
        return 0
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if settings.api_key:  # without a key, no port may be open to other machines
        os.environ.setdefault(_HA_PROXY, "1")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise StartupError(f"`quire deploy` needs Ray: {install_extra('ray')} ({error})") from None
    is_local = _connect(ray, address)
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": settings.host,
                "port": settings.port,
                "root_path": "",
                "request_timeout_s": None,
            },
        )
        _deploy(serve, options, settings)
        where = f"http://{settings.host}:{settings.port}"
        print(f"quire is deployed: {options.replicas} engines at {where}", file=sys.stderr)
        if is_local:
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda *_: stop.set())
            stop.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        if is_local:
            serve.shutdown()
        ray.shutdown()
    return 0


def _connect(ray: Any, address: str | None) -> bool:
    """Connect to a cluster, or start one; say whether it was started. Raises StartupError."""
    wanted = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": wanted is None, "configure_logging": True}
    try:
        ray.init(address=wanted or "auto", **quiet)
        return False
    except ConnectionError as error:
        if wanted is not None:
            raise StartupError(f"there is no Ray cluster at {wanted}: {error}") from None
    ray.init(address="local", include_dashboard=False, **quiet)
    return True


def _deploy(serve: Any, options: DeployOptions, settings: Settings) -> None:
    """Run the application until it serves. Raises StartupError if it cannot; then nothing of it
    stays, unless it was an update: what is left of the one before goes on to serve."""
    from .application import FAILED, make_application

    application = make_application(options, settings)
    is_update = NAME in serve.status().applications
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(NAME)
        texts = [] if status is None else [one.message for one in status.deployments.values()]
        for text in [*texts, str(error)]:
            reason = re.search(re.escape(FAILED) + r"[^\n]*", text)
            if reason is not None:
                raise StartupError(reason.group()) from None
        raise StartupError(f"Ray Serve cannot run it: {error}") from error
    finally:
        if not is_update and not _is_running(serve):
            serve.delete(NAME)


def _is_running(serve: Any) -> bool:
    application = serve.status().applications.get(NAME)
    return application is not None and application.status == "RUNNING"


def configuration(options: DeployOptions, settings: Settings) -> str:
    """Return the configuration for `serve deploy`, as YAML. Keys are not in it."""
    arguments = as_arguments(options, settings, secrets=False)
    for name in ("host", "port"):
        arguments.pop(name, None)
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments,
            }
        ],
    }
    note = "".join(
        f"# Set QUIRE_{name.upper()} in the environment of every node: keys are not written here.\n"
        for name in SECRETS
        if getattr(settings, name)
    )
    return note + yaml.safe_dump(document, sort_keys=False)
