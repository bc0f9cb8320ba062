"""Starting followers: each is a process that gets one line of JSON on its stdin, its lifeline."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import msgspec

from ..config import EngineConfig


class FollowerLaunch(msgspec.Struct):
    """What a follower needs to start; `address` is where rank 0 listens."""

    config: EngineConfig
    rank: int
    address: str
    log_level: str
    log_format: Literal["console", "json"]


def start_follower(
    launch: FollowerLaunch, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a follower on this host, by default with this process' environment. It ends when its
    stdin closes, and with the thread that calls this."""
    process = subprocess.Popen(
        (sys.executable, "-P", "-m", "quire.engine.parallel.follower_process"),
        stdin=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(launch) + b"\n")
    process.stdin.flush()
    return process


def address_of_host(config: EngineConfig) -> str:
    """Return the address at which host 0 waits for the followers of other hosts."""
    return f"tcp://{config.master_addr}:{config.master_port}"
