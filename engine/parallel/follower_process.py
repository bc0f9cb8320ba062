"""A follower's process: it runs the steps that rank 0 plans, for its part of the model.

    python -P -m quire.engine.parallel.follower_process

It knows no request and samples nothing. Like the engine's process it lives as long as its stdin is
open, and dies with its parent.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

import msgspec

from ..errors import StartupError
from .follower import Follower, StoppedError, obey
from .launch import FollowerLaunch

FAREWELL_SECONDS = 5.0
"""Time for which a follower that cannot start waits for rank 0 to end it."""

logger = logging.getLogger("quire.engine")


def main() -> int:
    """Run the follower. Return 0 if it was asked to stop, 1 after a failed start or a crash."""
    from ..process.engine_process import die_with_parent
    from ..process.json_logs import prepare_process

    die_with_parent()
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    launch = msgspec.json.decode(line, type=FollowerLaunch)
    prepare_process(launch.log_level, launch.log_format, f"engine rank {launch.rank}")
    if launch.log_level != "debug":  # rank 0 says the same
        logger.setLevel(logging.WARNING)
    ended = threading.Event()
    threading.Thread(target=_watch_lifeline, args=(ended,), daemon=True).start()
    ranks = Follower(launch)
    try:
        _follow(launch, ranks)
    except StoppedError:
        return 0
    except StartupError as error:
        ranks.fail(error)
        ended.wait(FAREWELL_SECONDS)
        return 1
    except Exception:
        logger.exception("rank %d failed", launch.rank)
    return 1


def _follow(launch: FollowerLaunch, ranks: Follower) -> None:
    """Load this rank's part of the model, then run steps until an exception."""
    from ..devices.choose import before_imports

    before_imports(launch.config)
    from ..process.heap import settle
    from ..process.json_logs import take_over_libraries
    from ..runner.worker import Worker

    take_over_libraries()
    worker = Worker(launch.config, ranks=ranks)
    worker.load()
    worker.profile()
    settle()
    while True:
        obey(worker, ranks.receive_order())


def _watch_lifeline(ended: threading.Event) -> None:
    """End this process when its stdin closes."""
    sys.stdin.buffer.read()
    ended.set()
    os._exit(0)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a collective that will never complete must not hold the end up
