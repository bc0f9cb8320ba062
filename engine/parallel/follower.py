"""A follower's side of a group of ranks: it joins, votes, and takes plans until rank 0 ends."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, Protocol

import zmq
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from zmq.utils.monitor import recv_monitor_message

from ..adapters.adapter import Adapter, LoraWeight
from ..devices.backend import Backend
from ..errors import StartupError
from ..network.keys import shared_keys
from . import messages
from .adapter_cuts import unpack_weight
from .launch import FollowerLaunch
from .ranks import Collectives
from .step_plan import StepPlan

logger = logging.getLogger("quire.engine")


class StoppedError(Exception):
    """Rank 0 has asked this rank to end."""


class Obedient(Protocol):
    """What carries out rank 0's orders: the worker of a follower."""

    def follow(self, plan: StepPlan) -> None: ...

    def hold_layer(self, adapter_id: int, name: str, weight: LoraWeight) -> None: ...

    def drop_adapter(self, adapter_id: int) -> None: ...

    def hold_blocks(self, num_slots: int) -> None: ...


def obey(worker: Obedient, order: messages.Order) -> None:
    """Let a worker carry out an order of rank 0."""
    match order:
        case messages.Step(plan):
            worker.follow(plan)
        case messages.AdapterLayer(adapter_id, name, rank, a, b):
            worker.hold_layer(adapter_id, name, unpack_weight(rank, a, b))
        case messages.DropAdapter(adapter_id):
            worker.drop_adapter(adapter_id)
        case messages.HostMemory(num_slots):
            worker.hold_blocks(num_slots)


class Follower(Collectives):
    """Implements Ranks, which states the contract, for a rank other than 0."""

    def __init__(self, launch: FollowerLaunch) -> None:
        """Dial rank 0, which need not listen yet, and join."""
        super().__init__(launch.config, launch.rank)
        self.rank, self.size = launch.rank, launch.config.num_ranks
        self._socket = messages.make_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"rank-%d" % self.rank)
        path = launch.config.node_key_file
        if path is not None and launch.address.startswith("tcp://"):
            keys = shared_keys(path)
            self._socket.set(zmq.CURVE_SERVERKEY, keys.public.encode())
            self._socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
            self._socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        monitor = self._socket.get_monitor_socket(messages.FAILED | zmq.EVENT_DISCONNECTED)
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

    def send_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        raise AssertionError("only rank 0 sends adapters")

    def drop_adapter(self, adapter_id: int) -> None:
        raise AssertionError("only rank 0 drops adapters")

    def hold_blocks(self, num_slots: int) -> None:
        raise AssertionError("only rank 0 decides what host memory holds")

    def close(self) -> None:
        """Do nothing: rank 0 ends the group."""

    def fail(self, error: StartupError) -> None:
        """Tell rank 0 why this rank cannot start."""
        self._send(messages.Failed(error.code, error.message))

    def receive_order(self) -> messages.Order:
        """Wait for the next thing to do. Raises StoppedError at the end."""
        order = self._receive()
        assert isinstance(order, messages.Order)
        return order

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
        how = "is broken"
        if recv_monitor_message(monitor)["event"] != zmq.EVENT_DISCONNECTED:
            how = "was refused: is --node-key-file the same on all hosts?"
        logger.warning("rank %d: the connection to rank 0 %s", self.rank, how)
        os._exit(1)
