"""One simulated world: clients, HTTP processes and engines under a virtual clock, with faults.

Real are: the clients of the engine with the supervisor that restarts it, the messages, the engine's
server, step loop, scheduler, request table, block manager, prefix index, adapter table and
speculator. Simulated are time, links, processes and the device, whose model is a hash of a
sequence's own tokens and whose K/V are those hashes, read back in every step. All that is random
comes from the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from quire.engine.config import EngineConfig, SchedulingPolicy
from quire.engine.errors import EngineError, InvalidRequestError, PoolTooSmallError, QuireError
from quire.engine.fleet import fleet_client
from quire.engine.lora import AdapterSource
from quire.engine.outputs import EngineStats, SequenceOutput, Timings
from quire.engine.process import (
    attached_client,
    engine_process,
    process_client,
    remote_client,
    stream,
    streams,
    wire,
)
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.remote_client import EngineStatus, State
from quire.engine.process.stream import MAX_DEATHS
from quire.engine.process.streams import StreamTable
from quire.engine.request import Request

from ..tiers.stores import FaultyStore
from .clients import ADAPTERS, Plan, answer, is_cut_of, make_plans
from .engine import SimHandle, SimLink, SimProcess
from .fronts import Client, Front, MainFront, WorkerFront
from .virtual_loop import VirtualLoop

STALL_SECONDS = 8.0
"""Time without a sign of life after which an engine is killed."""
TIME_LIMIT = 1500.0
"""Virtual time by which every request must have ended."""
SLOW_SECONDS = (0.5, 3.0)
"""Bounds of the duration of a slow step."""
MAX_DELAY_SECONDS = 0.5
"""The longest that a message takes."""
EPSILON = 1e-6
"""What the sums of times may differ by."""
GREETING_SECONDS = 3 * MAX_DELAY_SECONDS + SLOW_SECONDS[1]
"""How long after the start of an engine or of an HTTP worker they may not know each other."""
SWARM = (
    "disconnects", "aborts", "deadlines", "slow readers", "bad rows", "grammars", "out of memory",
    "slow steps", "crashes", "hangs", "late messages", "repeated messages", "junk", "adapters",
    "HTTP workers", "worker deaths", "cache resets", "poison",
    "giving up",
)  # fmt: skip
"""Kinds of behaviour and faults; a world has a random choice of them."""
WINDOWS: tuple[tuple[int | None, ...], ...] = (
    *((None,), (None,), (None,)),
    *((None, 5), (None, 20), (None, 33, 33), (None, -40, 9), (17,)),
)
"""How many of the latest tokens each group of layers keeps, a negative one in chunks; half of the
worlds have windows."""


@dataclass(frozen=True)
class Settings:
    """What differs from world to world, all drawn from the seed."""

    seed: int
    num_requests: int
    block_size: int
    num_blocks: int
    windows: tuple[int | None, ...]
    max_num_seqs: int
    budget: int
    policy: SchedulingPolicy
    prefix_caching: bool
    run_ahead: bool
    speculation: str
    adapter_slots: int
    max_step_tokens: int | None
    max_restarts: int
    num_workers: int
    pace: float
    step_seconds: float
    check_every: int
    swarm: frozenset[str]
    num_engines: int
    snapshots: int | None = None
    """How many snapshots of states there may be; None: the model's layers keep no states."""
    host_slots: int = 0
    """Blocks of host memory for evicted ones."""
    store_faults: float | None = None
    """The chance of a fault of the store below host memory; None without one."""

    @classmethod
    def draw(cls, seed: int, num_requests: int) -> Settings:
        rng = random.Random(f"settings {seed}")
        swarm = frozenset(kind for kind in SWARM if rng.random() < 0.5)
        block_size = rng.choice([1, 2, 4, 8, 16])
        budget = max(block_size, rng.choice([4, 8, 16, 32, 64, 128]))
        limits = [None, max(block_size, budget // 2)]
        windows = random.Random(f"windows {seed}").choice(WINDOWS)
        tiers = random.Random(f"tiers {seed}")
        host_slots = tiers.choice([0, 0, 1, 2, 4, 8, 30])
        settings = cls(
            seed=seed,
            num_requests=num_requests,
            block_size=block_size,
            num_blocks=-(-rng.randint(60, 400) // block_size) * len(windows),
            windows=windows,
            max_num_seqs=rng.choice([1, 2, 3, 4, 6, 8, 12]),
            budget=budget,
            policy=rng.choice(["fcfs", "priority", "fair"]),
            prefix_caching=rng.random() < 0.85,
            run_ahead=rng.random() < 0.5,
            speculation=rng.choice(["none", "none", "random", "real"]),
            adapter_slots=rng.choice([1, 2]),
            max_step_tokens=rng.choice(limits) if "out of memory" in swarm else None,
            max_restarts=rng.choice([0, 1, 2]) if "giving up" in swarm else 10**9,
            num_workers=rng.choice([1, 2, 3]) if "HTTP workers" in swarm else 0,
            pace=rng.choice([0.03, 0.06, 0.12]),
            step_seconds=rng.choice([0.005, 0.01, 0.02]),
            check_every=rng.choice([1, 3, 10]),
            swarm=swarm,
            num_engines=rng.choice([1, 1, 1, 2, 3]),
            host_slots=host_slots,
            store_faults=tiers.choice([None, 0.05, 0.0, 0.1]) if host_slots else None,
        )
        if settings.speculation != "none" or settings.windows != (None,) or host_slots:
            return settings  # a state cannot be rewound nor evicted, and its layers have one table
        snapshots = random.Random(f"states {seed}").choice([None, 0, 1, 3, 20])
        if windows != (None,):
            return settings  # layers that keep states stand in one group
        if snapshots is None or settings.prefix_caching:
            return replace(settings, snapshots=snapshots)
        return replace(settings, snapshots=0)

    @property
    def late_seconds(self) -> float:
        """How long after its deadline, or after its client left, a request may go on: for the step
        that runs, two steps more of which one was launched ahead, and the delays of messages."""
        step = SLOW_SECONDS[1] if "slow steps" in self.swarm else self.step_seconds
        delay = MAX_DELAY_SECONDS if "late messages" in self.swarm else 0.0
        return 3 * step + 2 * delay + wire.HEARTBEAT_SECONDS


@dataclass
class _Outage:
    """A time in which an engine does not answer; `end` is None while it lasts."""

    engine: str
    begin: float
    end: float | None = None


@dataclass
class Record:
    """What a client has seen of its request."""

    plan: Plan
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    finals: dict[int, SequenceOutput] = field(default_factory=dict)
    submitted: float = 0.0
    ended: float | None = None
    left: bool = False
    """Whether the client disconnected, or its HTTP worker died."""
    refused: QuireError | None = None
    aborted: set[int] = field(default_factory=set)

    @property
    def errors(self) -> list[str]:
        """The codes of the errors that ended choices."""
        return [final.error.code for final in self.finals.values() if final.error is not None]


@dataclass
class Report:
    """What became of a world."""

    seed: int
    digest: str
    steps: int
    requests: int
    choices: int
    outcomes: Counter[str]
    faults: Counter[str]
    counts: Counter[str]
    longest_wait: float
    violation: str | None = None


class World:
    """Runs one seed. A violation of what quire promises ends it and is reported."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._rng = random.Random(f"world {settings.seed}")
        self.faults: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        plans = make_plans(
            random.Random(f"plans {settings.seed}"),
            settings.num_requests,
            settings.pace / settings.num_engines,
            max(1, settings.num_workers),
            set(settings.swarm),
        )
        self.plans = {plan.request.request_id: plan for plan in plans}
        self.offenders: set[str] = set()
        """Requests with which no step fits into the device's memory."""
        self.first_adapters = [_adapter(name) for name in ADAPTERS]
        self.engines = [str(index) for index in range(settings.num_engines)]
        self.processes: dict[str, SimProcess] = {}
        self.latest: dict[str, SimProcess] = {}
        """The last process of each engine."""
        self._places: dict[str, str] = {}
        """The last engine of each request."""
        self._records: dict[str, Record] = {}
        self._outages: list[_Outage] = []
        self._seeds: dict[str, int | None] = {}
        """The seed of each request that an engine has got."""
        self._poisoned: Counter[str] = Counter()
        """How many engines each poisonous request has killed."""
        self._given_up = False
        """Whether no engine is started any more."""
        self._worker_starts: list[float] = []
        """When HTTP workers took the places of others."""
        self._violation: asyncio.Future[None]
        self._digest = hashlib.blake2b(digest_size=16)
        self._steps = 0
        self._last_stats: EngineStats | None = None
        self._longest_wait = 0.0
        self._loop = VirtualLoop()
        self.stored_blocks = FaultyStore(200, settings.seed, settings.store_faults or 0.0)
        """The store below host memory, which outlives the engines."""
        self._workers: list[WorkerFront] = []

    # -- what the simulated parts ask ----------------------------------------------------------

    def clock(self) -> float:
        return self._loop.time()

    def plan_of(self, sent_id: str) -> Plan:
        """Return the plan of the request that has this id at an engine."""
        return self.plans[_request_id(sent_id)]

    def is_ready(self, request: Request) -> bool:
        plan = self.plan_of(request.request_id)
        submitted = self._records[plan.request.request_id].submitted
        return self.clock() >= submitted + plan.compiles_for

    def arrived(self, request: Request, engine: str) -> None:
        """Note that an engine gets a request."""
        self._note("arrival", request.request_id, request.sampling_params.seed, engine)
        before = self._places.get(_request_id(request.request_id), engine)
        self._places[_request_id(request.request_id)] = engine
        self._counts["moves to another engine"] += engine != before
        self._counts["prompts that another engine has cached"] += bool(
            request.expected_cached_tokens and len(self.engines) > 1
        )
        seed = request.sampling_params.seed
        first = self._seeds.setdefault(_request_id(request.request_id), seed)
        assert seed == first, f"{request.request_id} has another seed than before"
        if "~" in request.request_id:
            self._counts["moves of requests"] += 1
            self._counts["moves in the midst of an answer"] += bool(request.resume)
            self._counts["moves on trial"] += request.on_trial

    def has_left(self, request_id: str) -> bool:
        record = self._records[_request_id(request_id)]
        if not record.left or record.ended is None:
            return False
        return self.clock() - record.ended > self.settings.late_seconds

    def salt_number(self, request_id: str) -> int:
        salt = self.plan_of(request_id).request.cache_salt
        return (None, "one", "other").index(salt)

    def answer(self, request: Request, choice: int) -> list[int]:
        return answer(request, choice)

    def _happens(self, kind: str, chance: float) -> bool:
        return kind in self.settings.swarm and self._rng.random() < chance

    def step_fault(self, request_ids: list[str]) -> str | None:
        """Return what happens to the engine in a step with these requests."""
        poison = {_request_id(one) for one in request_ids if self.plan_of(one).is_poison}
        if poison:
            self._poisoned.update(poison)
            self.faults["poison in a step"] += 1
            return "crash"
        if self._happens("crashes", 0.002):
            return "crash"
        return "hang" if self._happens("hangs", 0.0005) else None

    def step_seconds(self) -> float:
        if self._happens("slow steps", 0.003):
            self.faults["slow step"] += 1
            return self._rng.uniform(*SLOW_SECONDS)
        return self.settings.step_seconds

    def load_seconds(self) -> float:
        return self._rng.uniform(0.1, 1.0) if self._outages else 0.1

    def delay(self) -> float:
        if self._happens("late messages", 0.1):
            self.faults["late message"] += 1
            return min(self._rng.expovariate(10.0), MAX_DELAY_SECONDS)
        return 0.0

    def repeats(self) -> bool:
        repeated = self._happens("repeated messages", 0.3)
        self.faults["repeated message"] += repeated
        return repeated

    def _outages_of(self, engine: str) -> list[_Outage]:
        return [outage for outage in self._outages if outage.engine == engine]

    def begin_outage(self, engine: str) -> None:
        """Note that from now on an engine does not answer."""
        known = self._outages_of(engine)
        if not known or known[-1].end is not None:
            self._outages.append(_Outage(engine, self.clock()))

    def end_outage(self, engine: str) -> None:
        """Note that an engine has loaded."""
        known = self._outages_of(engine)
        if known and known[-1].end is None:
            known[-1].end = self.clock()

    def died(self, process: SimProcess, why: str) -> None:
        if why != "asked to end":
            self.faults[f"engine: {why}"] += 1
            self.begin_outage(process.engine)
        self._account(process)

    def _account(self, process: SimProcess) -> None:
        """Add up what an engine has done before it is forgotten."""
        if process.core is None:
            return
        self._longest_wait = max(self._longest_wait, process.core.watch.longest)
        stats = process.core.stats()
        for name in ("preemptions", "prefix_hits", "blocks_copied", "accepted_tokens"):
            self._counts[name] += getattr(stats, name)
        for tier in stats.tiers:
            self._counts[f"loaded from {tier.tier}"] += tier.loaded
            self._counts[f"failures of {tier.tier}"] += tier.failures
        process.core = None

    def stepped(self, stats: EngineStats, num_outputs: int) -> None:
        self._steps += 1
        self._note("step", stats.step, stats.step_tokens, stats.num_free_blocks, num_outputs)

    def _note(self, *what: Any) -> None:
        self._digest.update(repr((self.clock(), *what)).encode())

    def violated(self, error: BaseException) -> None:
        if not self._violation.done():
            self._violation.set_exception(error)

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> Report:
        """Run the world to its end. A violation is part of the report."""
        violation = None
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with self._in_place(), asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except (AssertionError, QuireError, LookupError, TypeError, ValueError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            violation = f"{type(error).__name__} in {place.name}, {place.line}: {error}"
        finally:
            logging.disable(level)
        records = list(self._records.values())
        return Report(
            self.settings.seed,
            self._digest.hexdigest(),
            self._steps,
            len(records),
            sum(record.plan.request.sampling_params.n for record in records),
            Counter(_outcome(record) for record in records),
            +self.faults,
            self._counts,
            self._longest_wait,
            violation,
        )

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the simulated link and process in place of the real ones."""
        numbers = count()

        @contextlib.contextmanager
        def folder() -> Iterator[Path]:
            yield Path(f"/simulated/{next(numbers)}")

        link = type("Link", (SimLink,), {"world": self})
        handle = type("Handle", (SimHandle,), {"world": self})
        time = SimpleNamespace(monotonic=self.clock)
        timed = (engine_process, fleet_client, remote_client, stream, streams)
        with ExitStack() as stack:
            for module, name, value in (
                (process_client, "EngineHandle", handle),
                (process_client, "private_folder", folder),
                (attached_client, "EngineLink", link),
                *((module, "time", time) for module in timed),
            ):
                stack.enter_context(patch.object(module, name, value))
            yield

    async def _main(self) -> None:
        self._violation = self._loop.create_future()
        main = MainFront(self.settings.num_engines, self._make_engine)
        for index, engine in enumerate(main.engines if self.settings.num_workers else ()):
            engine.on_status = partial(self._tell, index)
        numbers = range(self.settings.num_workers)
        self._workers = [WorkerFront(number, self.settings.num_engines) for number in numbers]
        await main.client.start()
        everything = asyncio.create_task(self._everything(main))
        done, _ = await asyncio.wait(
            {everything, self._violation},
            timeout=TIME_LIMIT,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert done, "a request never ends"
        if self._violation.done():
            self._violation.result()
        await everything
        await main.client.close()

    def _make_engine(self, index: int, streams: StreamTable | None) -> ProcessEngineClient:
        return ProcessEngineClient(
            EngineConfig(model="sim"),
            stall_timeout=STALL_SECONDS,
            max_restarts=self.settings.max_restarts,
            streams=streams,
            environment={"ENGINE": str(index)},
        )

    async def _everything(self, main: MainFront) -> None:
        await main.client.wait_ready()
        faults = asyncio.create_task(self._inject(main))
        clients = [asyncio.create_task(self._client(plan, main)) for plan in self.plans.values()]
        try:
            await asyncio.gather(*clients)
        finally:
            faults.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await faults
        await self._settle(main)
        self._check_all()

    async def _settle(self, main: MainFront) -> None:
        """Wait until all messages have arrived; then nothing may be left of any request."""
        settled = (State.READY, State.FAILED)
        while any(engine.status.state not in settled for engine in main.engines):
            await asyncio.sleep(1.0)
        await asyncio.sleep(10.0)
        fronts: list[Front] = [main, *self._workers]
        for client in (front.client for front in fronts):
            assert not len(client._streams), "a client keeps streams"
            assert not client._streams._sent, "a client keeps streams that it has sent"
        states = [engine.status.state for engine in main.engines]
        self._given_up = states == [State.FAILED] * len(states)
        for name, engine in zip(self.engines, main.engines, strict=True):
            self._check_left(name, engine)

    def _check_left(self, name: str, engine: ProcessEngineClient) -> None:
        if engine.status.state is State.FAILED:
            number = len(self._outages_of(name))
            assert number > self.settings.max_restarts, "it was given up too early"
            self.faults["engine given up"] += 1
            return
        assert engine.health().ready, "the engine was restarted without a reason"
        process = self.latest[name]
        assert process.core is not None and process.server is not None
        assert not process.core.has_work, "work is left: something waits for ever"
        process.core.check_empty()
        assert not process.server._open, f"the server keeps {list(process.server._open)}"
        stats = engine.stats()
        if stats is None:
            assert not process.core.num_steps, "nobody has heard of the engine's steps"
        else:
            assert stats.num_free_blocks == stats.num_blocks
        self._account(process)

    # -- clients -------------------------------------------------------------------------------

    def _client_for(self, plan: Plan, main: MainFront) -> Client:
        return self._workers[plan.client].client if self._workers else main.client

    async def _client(self, plan: Plan, main: MainFront) -> None:
        await asyncio.sleep(plan.at - self.clock())
        record = Record(plan, submitted=self.clock())
        self._records[plan.request.request_id] = record
        asking = asyncio.create_task(self._ask(record, self._client_for(plan, main)))
        if self._workers:
            self._workers[plan.client].asking.add(asking)
        try:
            async with asyncio.timeout(plan.leaves_at):
                await asyncio.wait({asking})
        except TimeoutError:
            asking.cancel()
            await asyncio.wait({asking})
        record.ended = self.clock()
        if asking.cancelled():
            record.left = True
            self.faults["disconnect"] += 1
        else:
            asking.result()
        self._note("end", plan.request.request_id, record.left, repr(record.refused))

    async def _ask(self, record: Record, client: Client) -> None:
        plan = record.plan
        num_tokens = 0
        try:
            async with contextlib.aclosing(client.generate(plan.request)) as outputs:
                async for output in outputs:
                    self._take(record, output)
                    num_tokens += len(output.token_ids)
                    if plan.leaves_after is not None and num_tokens >= plan.leaves_after:
                        self.faults["disconnect"] += 1
                        record.left = True
                        return
                    if plan.aborts is not None and num_tokens >= plan.aborts[1]:
                        choice = plan.aborts[0]
                        record.aborted.add(choice)
                        self.faults["abort"] += 1
                        client.abort(plan.request.request_id, choice)
                    if plan.pause:
                        await asyncio.sleep(plan.pause)
        except (InvalidRequestError, EngineError) as error:
            record.refused = error

    def _take(self, record: Record, output: SequenceOutput) -> None:
        request = record.plan.request
        self._note(output[:3], output.finish_reason)
        assert output.request_id == request.request_id, "another request's output"
        assert output.choice not in record.finals, f"{request.request_id} goes on after its end"
        record.tokens[output.choice] += output.token_ids
        if output.finish_reason is not None:
            record.finals[output.choice] = output

    # -- faults from outside -------------------------------------------------------------------

    async def _inject(self, main: MainFront) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1.0))
            process = self.latest[self._any_of(self.engines)]
            if self._happens("crashes", 0.03) and process.core is not None:
                process.end(-9, "killed from outside")
            if self._happens("junk", 0.5):
                self.faults["junk on the socket"] += 1
                sender = self._rng.choice([b"main", b"stranger"])
                process.arrive(sender, self._rng.randbytes(self._rng.randrange(40)))
            if self._happens("adapters", 0.2):
                await self._change_adapters(main)
            if self._happens("cache resets", 0.2) and main.client.health().ready:
                with contextlib.suppress(EngineError):
                    await main.client.reset_prefix_cache()
            if self._workers and self._happens("worker deaths", 0.1):
                self._kill_worker(self._rng.choice(self._workers), main)

    def _any_of(self, names: list[str]) -> str:
        return names[0] if len(names) == 1 else self._rng.choice(names)

    async def _change_adapters(self, main: MainFront) -> None:
        name = self._rng.choice(ADAPTERS)
        try:
            if name != ADAPTERS[0] and self._rng.random() < 0.5:
                await main.client.unload_adapter(name)
            else:
                await main.client.load_adapter(_adapter(name), replace=True)
        except (EngineError, InvalidRequestError) as error:
            self._counts[f"adapter change refused: {error.code}"] += 1
        self.faults["adapter change"] += 1

    def _tell(self, index: int, status: EngineStatus) -> None:
        for worker in self._workers:
            worker.links[index].follow(status)

    def _kill_worker(self, worker: WorkerFront, main: MainFront) -> None:
        self.faults["HTTP worker killed"] += 1
        name, delay = worker.die(), self._rng.expovariate(10.0)
        for link, engine in zip(worker.links, main.engines, strict=True):
            self._loop.call_later(delay, engine.client_gone, name)
            link.follow(engine.status)
        self._worker_starts.append(self.clock())

    # -- checks --------------------------------------------------------------------------------

    def _check_all(self) -> None:
        assert len(self._records) == len(self.plans)
        self._check_poison()
        for name, record in self._records.items():
            try:
                self._check(record)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    def _check_poison(self) -> None:
        """Assert that what kills engines is found, and that nothing else ends with it: of one
        poisonous request alone, all that is told arrives."""
        if "late messages" in self.settings.swarm:
            return  # an engine may have died before anyone knew what it had begun
        for name, deaths in self._poisoned.items():
            assert deaths <= MAX_DEATHS + 1, f"{name} has killed {deaths} engines"
        if self.settings.swarm.isdisjoint({"crashes", "hangs", "giving up"}):
            for name, record in self._records.items():
                if not (record.plan.is_poison or self._cannot_move(record)):
                    assert "engine_dead" not in record.errors, f"{name} ended with the poison"

    def _cannot_move(self, record: Record) -> bool:
        """Return whether a request cannot go on at another engine once it has begun."""
        request = record.plan.request
        # Beams are not resumed, and the adapter may have been unloaded.
        has_lost = request.adapter not in (None, ADAPTERS[0])
        return request.sampling_params.beam_width is not None or has_lost

    def _check(self, record: Record) -> None:
        request = record.plan.request
        assert record.ended is not None
        for choice, tokens in record.tokens.items():
            whole = answer(request, choice)
            assert is_cut_of(tokens, whole), f"choice {choice} got {tokens}, not {whole}"
        if record.refused is not None:
            self._check_refusal(record, record.refused)
            return
        if not record.left:
            n = request.sampling_params.n
            assert sorted(record.finals) == list(range(n)), f"only {sorted(record.finals)} ended"
        for choice, final in record.finals.items():
            self._check_end(record, choice, final)
        if request.deadline is not None:
            late = record.ended - request.deadline
            read = len(record.tokens) and record.plan.pause
            # Only the watchdog notices that an engine hangs.
            allowed = self.settings.late_seconds + bool(self._deaths_during(record)) * (
                STALL_SECONDS + 1.0
            )
            if "hangs" not in self.settings.swarm and self._passes_in_outage(record):
                allowed = EPSILON  # its client ends it, which knows at once of the death
            assert late < allowed or read, f"it ended {late:.1f} s after its deadline"

    def _passes_in_outage(self, record: Record) -> bool:
        """Return whether a request's deadline passes while no engine has it."""
        deadline = record.plan.request.deadline
        assert deadline is not None
        return all(
            any(
                outage.begin < deadline and (outage.end is None or deadline < outage.end)
                for outage in self._outages_of(engine)
            )
            for engine in self.engines
        )

    def _deaths_during(self, record: Record, engine: str | None = None) -> int:
        """Return how often engines, or only this one, died while the request was open, or soon
        after."""
        assert record.ended is not None
        return sum(
            outage.begin <= record.ended
            and (outage.end is None or record.submitted <= outage.end + GREETING_SECONDS)
            for outage in (self._outages if engine is None else self._outages_of(engine))
        )

    def _check_refusal(self, record: Record, error: QuireError) -> None:
        request = record.plan.request
        match error.code:
            case "engine_not_ready":
                starts = [record.submitted - start for start in self._worker_starts]
                all_died = all(self._deaths_during(record, engine) for engine in self.engines)
                assert all_died or any(0.0 <= age < GREETING_SECONDS for age in starts), (
                    "no engine was ready without a reason"
                )
            case "model_not_found":
                assert request.adapter not in (None, ADAPTERS[0])
            case "kv_pool_too_small":
                assert isinstance(error, PoolTooSmallError)
            case "invalid_value":
                width = request.sampling_params.beam_width or 0
                assert width > self.settings.max_num_seqs, error.message
            case code:
                raise AssertionError(f"refused with {code}: {error.message}")

    def _check_end(self, record: Record, choice: int, final: SequenceOutput) -> None:
        request, plan = record.plan.request, record.plan
        if final.timings is not None:
            _check_timings(final.timings, record)
        if final.finish_reason == "abort":
            mine = record.aborted if request.sampling_params.beam_width is None else {0, choice}
            assert choice in mine and record.aborted, "aborted, and nobody asked for it"
        elif final.finish_reason == "error":
            assert final.error is not None and record.ended is not None
            code = final.error.code
            match code:
                case "engine_dead":
                    may_end = self._given_up or self._cannot_move(record)
                    few = 1 if may_end else MAX_DEATHS + 1
                    deaths = self._deaths_during(record)
                    assert deaths >= few, f"engine_dead, and only {deaths} engines died"
                case "request_timeout":
                    assert request.deadline is not None
                    assert record.ended >= request.deadline - EPSILON
                case "queue_timeout":
                    assert request.queue_deadline is not None
                    assert record.ended >= request.queue_deadline - EPSILON
                case _:
                    assert code in plan.may_fail, f"{code}, a fault of another request"
        else:
            whole = answer(request, choice)
            assert record.tokens[choice] == whole, "it ended before its end"


def _adapter(name: str) -> AdapterSource:
    return AdapterSource(name, f"/{name}", f"the weights of {name}")


def _request_id(sent_id: str) -> str:
    """Return the id that a request has at its client."""
    return sent_id.partition("~")[0]


def _check_timings(timings: Timings, record: Record) -> None:
    stations = [0.0, timings.scheduled, timings.first_token, timings.finished]
    passed = [time for time in stations if time is not None]
    in_order = all(one <= other + EPSILON for one, other in pairwise(passed))
    assert in_order, f"{timings} are not in order"
    assert record.ended is not None
    assert timings.finished <= record.ended - record.submitted + EPSILON, "it ended in the future"


def _outcome(record: Record) -> str:
    if record.left:
        return "client left"
    if record.refused is not None:
        return f"refused: {record.refused.code}"
    if record.errors:
        return f"error: {record.errors[0]}"
    if any(final.finish_reason == "abort" for final in record.finals.values()):
        return "aborted"
    return "complete"


def run_seed(seed: int, num_requests: int = 250) -> Report:
    """Run the world of a seed."""
    return World(Settings.draw(seed, num_requests)).run()
