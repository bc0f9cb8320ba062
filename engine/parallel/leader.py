"""Rank 0's side of a group of ranks: it starts the followers, sends them plans, and ends with them.

A group lives and dies as one. If a follower ends, or falls silent, this process ends at once and
without cleaning up, since it may stand in a collective that will never complete. Whoever supervises
the engine then starts all ranks again.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import threading
import time
from collections import defaultdict, deque
from dataclasses import fields, replace
from typing import Any, NoReturn

import msgspec
import zmq
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from zmq.utils.monitor import recv_monitor_message

from ..adapters.adapter import Adapter
from ..config import EngineConfig
from ..devices.backend import Backend
from ..errors import ConfigurationError, StartupError
from ..network.door import Guard
from ..network.keys import shared_keys
from . import messages
from .adapter_cuts import pack_weight
from .launch import FollowerLaunch, address_of_host, start_follower
from .ranks import Collectives
from .step_plan import StepPlan

PATIENCE_MS = 10_000
"""After this long without news, the log says which ranks are waited for."""
STOP_GRACE_SECONDS = 1.0
"""Time that followers get to end by themselves before they are killed."""

logger = logging.getLogger("quire.engine")


class Leader(Collectives):
    """Implements Ranks, which states the contract, for rank 0."""

    rank = 0

    def __init__(self, config: EngineConfig) -> None:
        """Start the followers of this host, and listen for those of others. Raises
        ConfigurationError if the address cannot be listened on."""
        super().__init__(config, 0)
        self.size = config.num_ranks
        self._config = config
        self._joined: set[int] = set()
        self._votes: dict[int, deque[list[int]]] = defaultdict(deque)
        self._closing = False
        self._guard: Guard | None = None
        path = config.node_key_file
        self._keys = shared_keys(path) if config.nnodes > 1 and path is not None else None
        self._folder = contextlib.ExitStack()
        self._socket = messages.make_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._fds: dict[int, int] = {}
        """The descriptor of each rank's connection."""
        watched = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        try:
            address = self._listen()
        except ConfigurationError:
            watched.close()
            raise
        self._processes = {
            rank: start_follower(self._launch(rank, address)) for rank in config.ranks_of_node[1:]
        }
        atexit.register(self.close)
        threading.Thread(target=self._watch_links, args=(watched,), daemon=True).start()
        for rank, process in self._processes.items():
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    # --- Ranks

    def meet(self, backend: Backend) -> None:
        self._collect()
        with contextlib.closing(_listening(self._config)) as listener:
            host, port = listener.getsockname()[:2]
            # The store owns the descriptor from here on.
            store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        self._tell(messages.Welcome(host, port))
        self.join(store, backend)

    def agree(self, values: list[int]) -> list[list[int]]:
        votes = [values, *self._collect()]
        self._tell(messages.Verdict(votes))
        return votes

    def send(self, plan: StepPlan) -> None:
        self._tell(messages.Step(plan))

    def send_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        for name, weight in adapter.weights.items():
            self._tell(messages.AdapterLayer(adapter_id, name, *pack_weight(weight)))

    def drop_adapter(self, adapter_id: int) -> None:
        self._tell(messages.DropAdapter(adapter_id))

    def hold_blocks(self, num_slots: int) -> None:
        self._tell(messages.HostMemory(num_slots))

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        for rank in self._joined:
            with contextlib.suppress(zmq.ZMQError):  # it has gone
                self._socket.send_multipart([_name(rank), messages.encode(messages.Stop())])
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._guard is not None:
            self._guard.close()
        self._folder.close()

    # --- messages

    def _listen(self) -> str:
        """Bind the socket, and return the address for the followers of this host."""
        from ..process.private_folder import private_folder

        folder = self._folder.enter_context(private_folder())
        address = f"ipc://{folder / 'ranks'}"
        self._socket.bind(address)
        if self._config.nnodes > 1:
            shared = address_of_host(self._config)
            if self._keys is not None:
                self._guard = Guard(self._socket, self._keys)
                self._guard.admit(self._keys.public)
            try:
                host = socket.gethostbyname(self._config.master_addr)
                self._socket.bind(f"tcp://{host}:{self._config.master_port}")
            except (OSError, zmq.ZMQError) as error:
                self._folder.close()
                self._socket.close()
                if self._guard is not None:
                    self._guard.close()
                raise ConfigurationError(
                    f"cannot listen on {shared} for other hosts: {error.strerror or error}"
                ) from error
            logger.info("waiting on %s for the ranks of other hosts", shared)
        return address

    def _launch(self, rank: int, address: str) -> FollowerLaunch:
        from ..process.json_logs import JsonFormatter

        root = logging.getLogger()
        is_json = any(isinstance(one.formatter, JsonFormatter) for one in root.handlers)
        level = logging.getLevelName(root.level).lower()
        return FollowerLaunch(self._config, rank, address, level, "json" if is_json else "console")

    def _tell(self, message: messages.ToFollower) -> None:
        data = messages.encode(message)
        for rank in range(1, self.size):
            try:
                self._socket.send_multipart([_name(rank), data])
            except zmq.ZMQError as error:
                _end(f"rank {rank} cannot be reached ({error})")

    def _collect(self) -> list[list[int]]:
        """Wait until every follower has joined and voted, and return the votes by rank."""
        others = range(1, self.size)
        while missing := [rank for rank in others if not self._votes[rank]]:
            if not self._socket.poll(PATIENCE_MS):
                logger.info("waiting for the ranks %s", ", ".join(map(str, missing)))
                continue
            first, second = self._socket.recv_multipart(copy=False)
            name = first.bytes
            try:
                message = messages.decode_to_leader(second.bytes)
            except (msgspec.MsgspecError, StartupError) as error:
                logger.warning("dropped a malformed message of %r: %s", name, error)
                continue
            self._handle(name, message, int(second.get(zmq.SRCFD)))
        # No stranger can find the socket's file from here on.
        self._folder.close()
        return [self._votes[rank].popleft() for rank in others]

    def _handle(self, name: bytes, message: messages.ToLeader, fd: int) -> None:
        """Handle a message that came over the connection with this descriptor."""
        match message:
            case messages.Join(rank):
                problem = self._problem_of(message)
                if problem is None and name == _name(rank):
                    self._joined.add(rank)
                    self._fds[rank] = fd
                    return
                self._socket.send_multipart(
                    [name, messages.encode(messages.Refused(problem or "its name is not its rank"))]
                )
                if problem is not None:
                    raise ConfigurationError(f"rank {rank} cannot join: {problem}")
            case messages.Vote(values):
                self._votes[_rank(name)].append(values)
            case messages.Failed(_, text):
                raise StartupError(f"rank {_rank(name)}: {text}")

    def _problem_of(self, join: messages.Join) -> str | None:
        """Return why a follower does not fit the group, if it does not."""
        if join.protocol != messages.PROTOCOL:
            return f"its protocol is {join.protocol}, not {messages.PROTOCOL}"
        if join.rank in self._joined or not 0 < join.rank < self.size:
            return "its --node-rank is another host's"
        own = self._config
        other = replace(join.config, node_rank=own.node_rank, node_key_file=own.node_key_file)
        differing = [
            one.name.replace("_", "-")
            for one in fields(other)
            if getattr(other, one.name) != getattr(own, one.name)
        ]
        if differing:
            return f"its --{', --'.join(differing)} is not that of host 0"
        return None

    # --- failures

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closing:
            _end(f"rank {rank} (process {process.pid}) ended with code {code}")

    def _watch_links(self, monitor: Any) -> None:
        """End with the first follower whose connection breaks, or that is silent for too long.

        Strangers come and go, and a connection that never spoke the protocol, or not with the right
        key, is no follower's. A handshake does not say whose it was; but once all ranks have
        joined, it is known which connections are theirs.
        """
        pending: set[int] = set()
        greeted: set[int] = set()
        while not self._closing:
            event = recv_monitor_message(monitor)
            kind, fd = event["event"], int(event["value"])
            if kind == zmq.EVENT_ACCEPTED:
                pending.add(fd)
                greeted.discard(fd)
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                greeted |= pending
                pending.clear()
            else:
                pending.discard(fd)
                all_joined = len(self._fds) == self.size - 1
                if fd in (self._fds.values() if all_joined else greeted):
                    time.sleep(0.05)  # if its process has ended, that is the better message
                    if not self._closing:
                        _end("the connection to a rank is broken, or it was silent for too long")


def _listening(config: EngineConfig) -> socket.socket:
    """Return a socket for the store of torch.distributed. Other hosts know its port."""
    if config.nnodes == 1:
        return socket.create_server(("127.0.0.1", 0))
    host, port = socket.gethostbyname(config.master_addr), config.master_port + 1
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _name(rank: int) -> bytes:
    """Return the ZeroMQ identity of a rank."""
    return b"rank-%d" % rank


def _rank(name: bytes) -> int:
    return int(name.removeprefix(b"rank-"))


def _end(reason: str) -> NoReturn:
    """End this process at once; whoever waits in a collective cannot be woken."""
    logger.critical("%s: the engine ends", reason)
    os._exit(1)
