"""The simulated engine process: the real server, step loop, scheduler and cache; a fake device.

Links and processes are simulated. Messages are the real ones, encoded and decoded, and each link
delivers them in order, as ZeroMQ does; links are delayed independently of each other.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import zmq

from quire.engine.cache.grouped_block_manager import make_block_manager
from quire.engine.cache.state_slots import StateSlots
from quire.engine.config import EngineConfig, EngineInfo
from quire.engine.core.snapshot import take_snapshot
from quire.engine.core.step_loop import StepLoop
from quire.engine.core.trials import Trials
from quire.engine.errors import QuireError
from quire.engine.events.block_events import BlockEvent
from quire.engine.grammar.constraints import NOTHING_PENDING, PendingConstraints
from quire.engine.lora import AdapterSource
from quire.engine.outputs import EngineStats, LiveSnapshot, RowError, StepOutput
from quire.engine.process import wire
from quire.engine.process.engine_process import EngineServer
from quire.engine.request import Request
from quire.engine.scheduling.adapter_table import AdapterTable
from quire.engine.scheduling.scheduler import Scheduler
from quire.engine.scheduling.tiered_scheduler import TieredScheduler
from quire.engine.sequence import ReadingRow, SequenceStatus
from quire.engine.speculation.cached import CachedDrafter
from quire.engine.speculation.ngram import NgramDrafter
from quire.engine.speculation.prediction import PredictionDrafter
from quire.engine.speculation.speculator import Speculator
from quire.engine.step import (
    NO_CONSTRAINTS,
    UNKNOWN_TOKEN,
    ModelRunnerOutput,
    SamplingConstraints,
    SchedulerOutput,
)
from quire.engine.tiers.block_tier import BlockTier

from ..harness import make_tier
from ..paged_fake import KnownSequence, PagedFakeWorker, chain
from ..speculation.drafters import FreeDrafts, RandomDrafter
from ..tiers.stores import Tasks
from .watch import Watch

if TYPE_CHECKING:
    from .world import World

VOCAB_SIZE = 5000
EOS = 7
MAX_MODEL_LEN = 120


class Crash(Exception):
    """The simulated engine process dies in a step."""


class Hang(Exception):
    """The simulated step never ends."""


class SimWorker(PagedFakeWorker):
    """A paged fake worker with faults. K/V differs by adapter and by salt, too."""

    def __init__(self, world: World, table: AdapterTable) -> None:
        settings = world.settings
        super().__init__(settings.num_blocks, settings.block_size, windows=settings.windows)
        self._world = world
        self._table = table
        self._adapters: dict[int, int] = {}
        self.runs_out_of_memory = self._runs_out

    def forward(self, output: SchedulerOutput) -> Any:
        for slot, adapter_id in output.adapter_loads:
            # The same weights give the same K/V, whenever they were loaded.
            self._adapters[slot] = zlib.crc32(self._table._keys[adapter_id].encode())
        executed = super().forward(output)
        fault = self._world.step_fault(self.request_ids(output))
        if fault == "crash":
            raise Crash
        if fault == "hang":
            raise Hang
        return executed

    def sample_rows(self, output: SchedulerOutput) -> ModelRunnerOutput:
        result = super().sample_rows(output)
        for row, seq_id in enumerate(output.seq_ids):
            known = self.known[seq_id]
            if known.spec.pooling and row not in output.partial_rows:
                history = self._histories(known, len(known.token_ids))[-1]
                result.embeddings[row] = history.to_bytes(8, "little", signed=True)
                result.token_ids[row] = None
        return result

    def _runs_out(self, output: SchedulerOutput) -> bool:
        world = self._world
        limit = world.settings.max_step_tokens
        if world.offenders.intersection(self.request_ids(output)):
            world.faults["out of memory by one request"] += 1
        elif limit is not None and output.total_tokens > limit:
            world.faults["out of memory by a large step"] += 1
        else:
            return False
        return True

    def _histories(self, sequence: KnownSequence, end: int) -> list[int]:
        spec = sequence.spec
        adapter = self._adapters[spec.adapter_slot] if spec.adapter_slot >= 0 else -1
        history = chain(self._world.salt_number(spec.request_id), adapter)
        histories = []
        for token_id in sequence.token_ids[:end]:
            history = chain(history, token_id)
            histories.append(history)
        return histories


class _Failing(PendingConstraints):
    """Constraints of which some rows cannot be worked out."""

    def __init__(self, errors: dict[int, RowError]) -> None:
        self._errors = errors

    def wait(self) -> SamplingConstraints:
        return NO_CONSTRAINTS

    @property
    def errors(self) -> dict[int, RowError]:
        return self._errors


class _Loading(NamedTuple):
    source: AdapterSource
    replace: bool
    read: Future[None]


class _Adapters:
    """What `LoadedAdapters` is to the server, without files."""

    def __init__(self, table: AdapterTable) -> None:
        self.table = table

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        return self.table.sources

    def begin(self, source: AdapterSource, *, replace: bool) -> _Loading:
        self.table.check_name(source.name, replace=replace)
        read: Future[None] = Future()
        read.set_result(None)
        return _Loading(source, replace, read)

    def finish(self, loading: Any) -> None:
        self.table.check_name(loading.source.name, replace=loading.replace)
        self.table.add(loading.source)

    def unload(self, name: str) -> None:
        self.table.remove(name)


class SimCore:
    """`EngineCore` with a virtual clock, grammars that are only delays and failures, and checks
    after each step."""

    def __init__(self, world: World, config: EngineConfig, engine: str) -> None:
        self._world, self._engine = world, engine
        settings = world.settings
        states = None
        if settings.snapshots is not None:
            size = settings.block_size
            states = StateSlots(settings.max_num_seqs, settings.snapshots, size, 2 * size)
        self.manager = make_block_manager(
            settings.num_blocks,
            settings.block_size,
            settings.windows,
            enable_prefix_caching=settings.prefix_caching,
            states=states,
        )
        self._table = AdapterTable(settings.adapter_slots, 8)
        for source in config.lora or world.first_adapters:
            self._table.add(source)
        self.adapters = _Adapters(self._table)
        self.speculator = self._make_speculator()
        self._trials = Trials()
        self.worker = SimWorker(world, self._table)
        self.tier: BlockTier | None = None
        self._reads, self._writes = Tasks(), Tasks()
        make_scheduler: Callable[..., Scheduler] = Scheduler
        if settings.host_slots and settings.prefix_caching:
            self.tier = make_tier(
                self.manager,
                self.worker,
                settings.host_slots,
                None if settings.store_faults is None else world.stored_blocks,
                world.clock,
                self._reads,
                self._writes,
            )
            make_scheduler = partial(TieredScheduler, tier=self.tier)
        self.scheduler = make_scheduler(
            self.manager,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.budget,
            eos_token_ids=(EOS,),
            policy=settings.policy,
            seed=1,
            clock=world.clock,
            is_ready=lambda request: world.is_ready(request) and self._trials.admits(request),
            adapters=self._table,
            speculator=self.speculator,
        )
        self._loop = StepLoop(
            self.scheduler, self.worker, self._constrain, run_ahead=settings.run_ahead
        )
        self.watch = Watch(self.scheduler, settings.policy, self._may_begin, world.has_left)
        self._num_tokens: dict[str, int] = {}
        self.num_steps = 0

    def _may_begin(self, request: Request) -> bool:
        """Return whether the last step could have admitted a request."""
        held = request.on_trial and self._trials._present not in (None, request.request_id)
        return not held and self._world.is_ready(request) and not self._waits_below(request)

    def _waits_below(self, request: Request) -> bool:
        """Return whether a sequence of a request may have to wait for the store below."""
        if not isinstance(self.scheduler, TieredScheduler):
            return False
        sequences = self.scheduler.requests.find(request.request_id)
        return any(one.seq_id in self.scheduler._readmission._waits for one in sequences)

    def _make_speculator(self) -> Speculator | None:
        kind = self._world.settings.speculation
        if kind == "none":
            return None
        right = RandomDrafter(
            lambda sequence: self._world.answer(sequence.request, sequence.choice),
            0.7,
            self._world.settings.seed,
        )
        drafters = [PredictionDrafter(), CachedDrafter(self.manager), NgramDrafter()]
        return Speculator(
            [right] if kind == "random" else drafters,
            max_draft=5,
            max_samples=64,
            cost=FreeDrafts(),
        )

    @property
    def info(self) -> EngineInfo:
        settings = self._world.settings
        return EngineInfo(
            model="sim",
            architecture="Fake",
            device="cpu",
            dtype="float32",
            num_parameters=1,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            group_windows=settings.windows,
            step_tokens=settings.budget * (1 + settings.run_ahead),
            kv_bytes_per_token=1,
            max_num_batched_tokens=settings.budget,
            is_asynchronous=settings.run_ahead,
            max_num_seqs=settings.max_num_seqs,
            max_logprobs=20,
            eos_token_ids=(EOS,),
            adapters=self._table.sources,
            max_lora_rank=8,
            max_loras=settings.adapter_slots,
            seed=settings.seed,
        )

    @property
    def has_work(self) -> bool:
        return self._loop.has_work

    def watch_begins(self, on_begin: Callable[[list[str]], None]) -> None:
        self._loop.on_begin = on_begin

    def add_request(self, request: Request) -> None:
        self._world.arrived(request, self._engine)
        request.check_fits(self.info)
        self.scheduler.add_request(request)
        self.watch.added(request)
        self._num_tokens[request.request_id] = sum(len(tokens or ()) for tokens in request.resume)
        self._fail_when_due(request.request_id, self._num_tokens[request.request_id])

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        self.scheduler.abort_request(request_id, choice)

    def step(self) -> StepOutput:
        self._reads.run(1 + self.num_steps % 3)
        self._writes.run(self.num_steps % 3)
        outputs = self._loop.step()
        self._table.take_dropped()
        self.num_steps += 1
        for output in outputs:
            request_id = output.request_id
            count = self._num_tokens[request_id] + len(output.token_ids)
            self._num_tokens[request_id] = count
            self._fail_when_due(request_id, count)
        stats = self.scheduler.stats()
        is_held = self.scheduler.budget.holds_admission
        self.watch.stepped(is_productive=stats.step_tokens > 0, is_held=is_held)
        self._trials.observe(outputs)
        if self.num_steps % self._world.settings.check_every == 0:
            self.check_integrity()
        self._world.stepped(stats, len(outputs))
        return StepOutput(outputs, stats)

    def _fail_when_due(self, request_id: str, num_tokens: int) -> None:
        plan = self._world.plan_of(request_id)
        if plan.row_fault is not None and num_tokens >= plan.fails_after:
            self.worker.errors[request_id] = RowError(plan.row_fault, "injected")
        if plan.is_offender and num_tokens >= plan.fails_after:
            self._world.offenders.add(request_id)

    def _constrain(self, rows: list[ReadingRow]) -> PendingConstraints:
        errors = {}
        for row, sequence, _ in rows:
            if sequence.status is SequenceStatus.FINISHED:
                continue  # it ended while the step was launched, and nobody looks at its row
            assert sequence.reads_tokens and UNKNOWN_TOKEN not in sequence.token_ids
            plan = self._world.plan_of(sequence.request.request_id)
            if plan.grammar_fails_after is not None and (
                sequence.num_output_tokens >= plan.grammar_fails_after
            ):
                errors[row] = RowError("grammar_failed", "injected")
        return _Failing(errors) if errors else NOTHING_PENDING

    def check_integrity(self) -> None:
        running = self.scheduler.running
        self.manager.check_integrity(running)
        self._table.check_integrity(running)
        if self.tier is not None:
            self.tier.host.check_integrity()
        assert len(running) <= self._world.settings.max_num_seqs
        ranks = [sequence.rank for sequence in running]
        assert ranks == sorted(ranks)

    def check_empty(self) -> None:
        """Assert that an engine without work holds nothing of any request."""
        self.check_integrity()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0), stats
        assert stats.num_free_blocks == stats.num_blocks, f"blocks leak: {stats}"
        assert not list(self.scheduler.requests.unfinished())
        assert not self._table._unfinished and not self._table._running
        if self.speculator is not None:
            assert not self.speculator._acceptances and not self.speculator._sources

    def close(self) -> None:
        """There are no threads to wait for."""

    def reset_prefix_cache(self) -> None:
        if self.tier is not None:
            self.tier.clear()
        self.manager.forget_free()

    def record_blocks(self, on: bool) -> None:
        self.manager.record_blocks(on)

    def take_block_events(self) -> list[BlockEvent]:
        return self.manager.take_block_events()

    def known_blocks(self) -> list[bytes]:
        return self.manager.known_blocks()

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def snapshot(self) -> LiveSnapshot:
        return take_snapshot(self.scheduler)

    def end_snapshots(self) -> None:
        self.manager.pool.trace = None


class Pipe:
    """One direction of a link. Messages arrive in order, some of them late."""

    def __init__(self, world: World, deliver: Callable[[bytes], None]) -> None:
        self._world = world
        self._deliver = deliver
        self._pending: deque[bytes] = deque()
        self._last = 0.0

    def put(self, data: bytes) -> None:
        delay = self._world.delay()
        if not delay and not self._pending:
            self._deliver(data)
            return
        loop = asyncio.get_running_loop()
        self._pending.append(data)
        self._last = max(self._last, loop.time() + delay)
        loop.call_at(self._last, self._next)

    def _next(self) -> None:
        if self._pending:
            self._deliver(self._pending.popleft())

    def cut(self) -> int:
        """Lose all that has not arrived; return how many messages that is."""
        lost = len(self._pending)
        self._pending.clear()
        return lost


class SimSocket:
    """The engine's ROUTER."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.links: dict[bytes, SimLink] = {}

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: list[bytes]) -> None:
        link = self.links.get(frames[0])
        if link is not None:
            link.to_client.put(frames[1])


class SimServer(EngineServer):
    """The engine's server, of which each `run` is one turn of its loop."""

    def __init__(self, socket: SimSocket) -> None:
        with Path("/dev/null").open() as stdin, patch.object(sys, "stdin", stdin):
            super().__init__(socket)  # type: ignore[arg-type]
        self._turns = 0

    def _poll(self, timeout_ms: int | None) -> bool:
        self._turns = 1 - self._turns
        return bool(self._turns)


class SimProcess:
    """An engine process, from its launch to its end."""

    def __init__(self, world: World, launch: wire.Launch, engine: str) -> None:
        """`engine` is its name among several."""
        self.world, self.engine = world, engine
        self.launch = launch
        self.socket = SimSocket()
        self.core: SimCore | None = None
        self.server: SimServer | None = None
        self.returncode: int | None = None
        self.exited = asyncio.Event()
        self._woken = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def arrive(self, client: bytes, data: bytes) -> None:
        if self.returncode is None:
            self.socket.inbox.append([client, data])
            self._woken.set()

    def end(self, code: int, why: str) -> None:
        """Let the process end at once. What has not arrived is lost."""
        if self.returncode is not None:
            return
        self.returncode = code
        self.world.died(self, why)
        for link in self.socket.links.values():
            self.world.faults["message lost with the engine"] += link.to_client.cut()
        self.task.cancel()
        self.exited.set()

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self.world.load_seconds())
            core = self.core = SimCore(self.world, self.launch.config, self.engine)
            server = self.server = SimServer(self.socket)
            self.world.end_outage(self.engine)
            while True:
                self._woken.clear()
                try:
                    server.run(core)  # type: ignore[arg-type]
                except Crash:
                    self.end(1, "crash in a step")
                    return
                except Hang:
                    self.world.begin_outage(self.engine)
                    await asyncio.Event().wait()
                if core.has_work:
                    await asyncio.sleep(self.world.step_seconds())
                elif not self._woken.is_set():
                    timer = asyncio.get_running_loop().call_later(
                        wire.HEARTBEAT_SECONDS, self._woken.set
                    )
                    await self._woken.wait()
                    timer.cancel()
        except (AssertionError, QuireError, LookupError, TypeError, ValueError) as error:
            self.world.violated(error)


class SimLink:
    """What `EngineLink` is: a client's socket to an engine."""

    world: World

    def __init__(self, address: str, name: bytes | None = None) -> None:
        self._process = self.world.processes[address]
        self.name = name or b"main"
        self._queue: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self.to_client = Pipe(self.world, self._arrive)
        self.to_engine = Pipe(self.world, lambda data: self._process.arrive(self.name, data))
        self._process.socket.links[self.name] = self
        self.dead = False
        self.send(wire.Hello(wire.PROTOCOL))

    def _arrive(self, data: bytes) -> None:
        if not self.dead:
            self._queue.append(data)
            self._filled.set()

    def send(self, message: wire.ToEngine) -> None:
        if self.dead:
            return
        self.to_engine.put(wire.encode(message))
        if isinstance(message, wire.Abort | wire.Hello) and self.world.repeats():
            self.to_engine.put(wire.encode(message))

    async def receive(self) -> wire.FromEngine:
        while not self._queue:
            self._filled.clear()
            await self._filled.wait()
        return wire.decode_from_engine(self._queue.popleft())

    def close(self) -> None:
        self.dead = True


class SimHandle(SimLink):
    """What `EngineHandle` is: a started engine process and the link to it."""

    def __init__(self, process: SimProcess, address: str) -> None:
        super().__init__(address)
        self.address = address

    @classmethod
    async def launch(
        cls, launch: wire.Launch, variables: Mapping[str, str] | None = None
    ) -> SimHandle:
        assert variables is not None
        process = SimProcess(cls.world, launch, variables["ENGINE"])
        cls.world.processes[launch.address] = cls.world.latest[process.engine] = process
        return cls(process, launch.address)

    @property
    def pid(self) -> int:
        return 1

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> None:
        await self._process.exited.wait()

    def hide_socket(self) -> None:
        """There is no file."""

    def ask_to_end(self) -> None:
        self._process.end(0, "asked to end")

    async def dump_and_kill(self) -> None:
        await asyncio.sleep(0.5)
        self._process.end(-9, "killed by the watchdog")

    async def stop(self) -> None:
        self.ask_to_end()
        self.close()
