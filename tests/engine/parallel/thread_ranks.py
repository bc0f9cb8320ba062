"""All ranks of a model in threads of one process, of which only one runs at a time.

A rank runs until it waits in a collective or for a plan, so that kernels that are not made for
several threads never meet. Plans cross as the bytes that processes would send each other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quire.engine.adapters.adapter import Adapter
from quire.engine.config import EngineConfig
from quire.engine.devices.backend import Backend
from quire.engine.parallel import messages
from quire.engine.parallel.adapter_cuts import pack_weight
from quire.engine.parallel.follower import obey
from quire.engine.parallel.group import SOLO, Group, Ring
from quire.engine.parallel.step_plan import StepPlan
from quire.engine.runner.worker import Worker

from ..test_oracle import Engine

PATIENCE_SECONDS = 60.0


class Shared:
    """What the threads have in common."""

    def __init__(self) -> None:
        self.baton = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other ranks run within."""
        self.baton.release()
        try:
            yield
        finally:
            self.baton.acquire()


class Meeting:
    """Ranks that exchange values: each gives one and gets all, by rank."""

    def __init__(self, shared: Shared, size: int) -> None:
        self._shared = shared
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        with self._shared.waiting():
            self._barrier.wait(PATIENCE_SECONDS)
        values = list(self._values)
        with self._shared.waiting():
            self._barrier.wait(PATIENCE_SECONDS)
        return values

    def abort(self) -> None:
        self._barrier.abort()


class ThreadGroup:
    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting
        self.num_calls = 0

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.num_calls += 1
        parts: list[torch.Tensor] = self._meeting.exchange(self.rank, x.clone())
        assert all(part.shape == x.shape and part.dtype == x.dtype for part in parts)
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x), dim=1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._all(x)[0])


class ThreadRing:
    def __init__(self, shared: Shared, pipes: list[queue.Queue[torch.Tensor]], stage: int) -> None:
        self.stage, self.size = stage, len(pipes)
        self._shared, self._pipes = shared, pipes

    def send(self, x: torch.Tensor) -> None:
        self._pipes[self.stage].put(x.clone())

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        with self._shared.waiting():
            sent = self._pipes[self.stage - 1].get(timeout=PATIENCE_SECONDS)
        assert sent.shape == x.shape and sent.dtype == x.dtype
        return x.copy_(sent)


class ThreadRanks:
    """Implements Ranks for one thread."""

    def __init__(
        self,
        rank: int,
        size: int,
        group: Group,
        ring: Ring | None,
        shared: Shared,
        votes: Meeting,
        inboxes: list[queue.Queue[bytes | None]],
    ) -> None:
        self.rank, self.size, self.group, self.ring = rank, size, group, ring
        self._shared, self._votes, self._inboxes = shared, votes, inboxes
        self.plans: list[StepPlan] = []

    def meet(self, backend: Backend) -> None:
        self._votes.exchange(self.rank, None)

    def agree(self, values: list[int]) -> list[list[int]]:
        return self._votes.exchange(self.rank, values)

    def send(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._tell(messages.Step(plan))

    def send_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        for name, weight in adapter.weights.items():
            self._tell(messages.AdapterLayer(adapter_id, name, *pack_weight(weight)))

    def drop_adapter(self, adapter_id: int) -> None:
        self._tell(messages.DropAdapter(adapter_id))

    def hold_blocks(self, num_slots: int) -> None:
        self._tell(messages.HostMemory(num_slots))

    def _tell(self, order: messages.Order) -> None:
        assert self.rank == 0
        for inbox in self._inboxes[1:]:
            inbox.put(messages.encode(order))

    def close(self) -> None:
        for inbox in self._inboxes[1:]:
            inbox.put(None)

    def receive(self) -> messages.Order | None:
        with self._shared.waiting():
            data = self._inboxes[self.rank].get(timeout=PATIENCE_SECONDS)
        if data is None:
            return None
        order = messages.decode_to_follower(data)
        assert isinstance(order, messages.Order)
        return order


class ParallelEngine(Engine):
    """An Engine of several ranks. Use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        make_backend: Callable[[], Backend] | None = None,
        **config: Any,
    ) -> None:
        sizes = (config.get("tensor_parallel_size", 1), config.get("pipeline_parallel_size", 1))
        self.ranks = make_ranks(*sizes)
        self._shared = self.ranks[0]._shared
        self._make_backend = make_backend
        self.failures: list[BaseException] = []
        self.followers: dict[int, Worker] = {}
        """The workers of the other ranks."""
        self._threads: list[threading.Thread] = []
        self._shared.baton.acquire()
        try:
            super().__init__(folder, None if make_backend is None else make_backend(), **config)
        except BaseException:
            self._give_up(self.ranks[0])
            self._shared.baton.release()
            for thread in self._threads:
                thread.join(PATIENCE_SECONDS)
            raise

    def make_worker(self, config: EngineConfig, backend: Backend | None) -> Worker:
        for ranks in self.ranks[1:]:
            thread = threading.Thread(target=self._follow, args=(config, ranks), daemon=True)
            thread.start()
            self._threads.append(thread)
        return Worker(config, backend, self.ranks[0])

    def _follow(self, config: EngineConfig, ranks: ThreadRanks) -> None:
        with self._shared.baton:
            try:
                backend = None if self._make_backend is None else self._make_backend()
                worker = Worker(config, backend, ranks)
                self.followers[ranks.rank] = worker
                worker.load()
                worker.profile()
                while (order := ranks.receive()) is not None:
                    obey(worker, order)
            except BaseException as error:
                self.failures.append(error)
                self._give_up(ranks)

    def _give_up(self, ranks: ThreadRanks) -> None:
        """Let nobody wait for these ranks."""
        ranks._votes.abort()
        if isinstance(ranks.group, ThreadGroup):
            ranks.group._meeting.abort()

    def __enter__(self) -> ParallelEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks[0].close()
        self._shared.baton.release()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        assert self.failures == []


def make_ranks(tensor_size: int, stages: int) -> list[ThreadRanks]:
    """Make the ranks of all threads."""
    shared, size = Shared(), tensor_size * stages
    votes = Meeting(shared, size)
    inboxes: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in range(size)]
    meetings = [Meeting(shared, tensor_size) for _ in range(stages)]
    pipes: list[list[queue.Queue[torch.Tensor]]] = [
        [queue.Queue() for _ in range(stages)] for _ in range(tensor_size)
    ]
    made = []
    for rank in range(size):
        stage, part = divmod(rank, tensor_size)
        group: Group = SOLO
        if tensor_size > 1:
            group = ThreadGroup(meetings[stage], part, tensor_size)
        ring = ThreadRing(shared, pipes[part], stage) if stages > 1 else None
        made.append(ThreadRanks(rank, size, group, ring, shared, votes, inboxes))
    return made
