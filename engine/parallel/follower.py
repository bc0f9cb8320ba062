"""A follower's side of a group of ranks: it joins, votes, and takes plans until rank 0 ends."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import zmq
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from zmq.utils.monitor import recv_monitor_message

from ..devices.backend import Backend
from ..errors import StartupError
from . import messages
from .launch import FollowerLaunch
from .ranks import Collectives
from .step_plan import StepPlan

logger = logging.getLogger("quire.engine")


class StoppedError(Exception):
    """Rank 0 has asked this rank to end."""


class Follower(Collectives):
    """Implements Ranks, which states the contract, for a rank other than 0."""

    def __init__(self, launch: FollowerLaunch) -> None:
        """Dial rank 0, which need not listen yet, and join."""
        super().__init__(launch.config, launch.rank)
        self.rank, self.size = launch.rank, launch.config.num_ranks
        self._socket = messages.make_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"rank-%d" % self.rank)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        threading.Thread(target=self._watch_link, args=(monitor,), daemon=True).start()
        self._socket.connect(launch.address)
        self._send(messages.Join(self.rank, messages.PROTOCOL, launch.config))

    def meet(self, backend: Backend) -> None:
        self._send(messages.Vote([]))
        welcome = self._receive()
        assert isinstance(welcome, messages.Welcome)
        self.join(TCPStore(welcome.host, welcome.port, is_master=False), backend)

    def agree(self, values: list[int]) -> list[list[int]]:
        self._send(messages.Vote(values))
        verdict = self._receive()
        assert isinstance(verdict, messages.Verdict)
        return verdict.votes

    def send(self, plan: StepPlan) -> None:
        raise AssertionError("only rank 0 makes plans")

    def close(self) -> None:
        """Do nothing: rank 0 ends the group."""

    def fail(self, error: StartupError) -> None:
        """Tell rank 0 why this rank cannot start."""
        self._send(messages.Failed(error.code, error.message))

    def receive_plan(self) -> StepPlan:
        """Wait for the next step. Raises StoppedError at the end."""
        step = self._receive()
        assert isinstance(step, messages.Step)
        return step.plan

    def _send(self, message: messages.ToLeader) -> None:
        self._socket.send(messages.encode(message))

    def _receive(self) -> messages.ToFollower:
        message = messages.decode_to_follower(self._socket.recv())
        match message:
            case messages.Stop():
                raise StoppedError
            case messages.Refused(reason):
                raise StartupError(f"rank {self.rank} cannot join: {reason}")
        return message

    def _watch_link(self, monitor: Any) -> None:
        recv_monitor_message(monitor)
        logger.warning("rank %d: the connection to rank 0 is broken", self.rank)
        os._exit(1)
