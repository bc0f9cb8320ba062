"""The ranks of a host other than 0: started together, and started again whenever one ends."""

from __future__ import annotations

import logging
import subprocess
import threading
from typing import Literal

from ..config import EngineConfig
from ..network.keys import shared_keys
from .launch import FollowerLaunch, address_of_host, start_follower

POLL_SECONDS = 0.1
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 10.0
"""Bounds of the delay before another start, which doubles with each that did not last."""
LASTING_POLLS = 600
"""A start that lasted for so many polls is followed by the next without a longer delay."""

logger = logging.getLogger("quire.engine")


def run_host(
    config: EngineConfig,
    environment: dict[str, str],
    stop: threading.Event,
    *,
    log_level: str,
    log_format: Literal["console", "json"],
) -> None:
    """Run this host's ranks until `stop` is set.

    They dial host 0 for as long as it takes. If one of them ends, which host 0 notices by itself,
    the others are killed and all are started again, to join host 0 when it is back. Raises
    ConfigurationError if there is something wrong with `node_key_file`.
    """
    if config.node_key_file is not None:
        shared_keys(config.node_key_file)
    delay = FIRST_DELAY_SECONDS
    while not stop.is_set():
        logger.info("ranks %s dial %s", list(config.ranks_of_node), address_of_host(config))
        launches = [
            FollowerLaunch(config, rank, address_of_host(config), log_level, log_format)
            for rank in config.ranks_of_node
        ]
        processes = [start_follower(launch, environment) for launch in launches]
        polls = 0
        while all(one.poll() is None for one in processes) and not stop.wait(POLL_SECONDS):
            polls += 1
        codes = [one.poll() for one in processes]
        _end(processes)
        if stop.is_set():
            return
        lasted = polls > LASTING_POLLS
        delay = FIRST_DELAY_SECONDS if lasted else min(2 * delay, MAX_DELAY_SECONDS)
        logger.warning("the ranks ended with codes %s; starting again in %.1f s", codes, delay)
        stop.wait(delay)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs: peers may wait in a collective that will never complete."""
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
