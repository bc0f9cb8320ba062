"""The engine without a process around it: requests in, steps, outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..cache.block_manager import BlockManager
from ..cache.grouped_block_manager import make_block_manager
from ..cache.state_slots import StateSlots
from ..config import EngineConfig, EngineInfo, WorkerInfo
from ..events.block_events import BlockEvent
from ..grammar.compile import read_tokenizer_json
from ..grammar.constraints import start_constraints
from ..grammar.masks import StructuredOutput
from ..outputs import EngineStats, LiveSnapshot, StepOutput
from ..request import Request
from ..scheduling.scheduler import Scheduler
from ..scheduling.tiered_scheduler import TieredScheduler
from ..speculation.cached import CachedDrafter
from ..speculation.grammar import GrammarDrafter
from ..speculation.model import ModelDrafter
from ..speculation.ngram import NgramDrafter
from ..speculation.prediction import PredictionDrafter
from ..speculation.speculator import MAX_POSITIONS, Speculator
from ..tiers.open_tier import open_tier
from ..worker_protocol import WorkerProtocol
from .adapters import LoadedAdapters
from .snapshot import take_snapshot
from .step_loop import StepLoop
from .trials import Trials

logger = logging.getLogger("quire.engine")

COMPILE_WAIT_SECONDS = 0.05
"""Seconds for which an engine with nothing else to do waits for grammars that are being compiled,
before it looks for new requests again."""


class EngineCore:
    """Owns a worker and a scheduler, which meet only in the step loop.

    It is not thread-safe: the thread that steps it also adds and aborts. The constructor raises
    StartupError if the model cannot be served.
    """

    def __init__(self, config: EngineConfig, worker: WorkerProtocol) -> None:
        loaded = worker.load()
        num_blocks = worker.profile()
        seats = min(config.max_num_seqs, worker.max_num_seqs())
        config = replace(config, max_num_seqs=seats)
        self._info = EngineInfo.of(config, loaded, num_blocks)
        self._adapters = LoadedAdapters(config, loaded, worker)
        self._structured = StructuredOutput(
            loaded.vocab_size, loaded.eos_token_ids, partial(read_tokenizer_json, config)
        )
        self._trials = Trials()
        states = _make_state_slots(config, loaded, num_blocks)
        is_cached = config.enable_prefix_caching and (states is None or states.num_snapshots > 0)
        block_manager = make_block_manager(
            num_blocks,
            config.block_size,
            loaded.group_windows,
            enable_prefix_caching=is_cached,
            states=states,
        )
        self._tier = open_tier(config, loaded, block_manager, worker)
        make_scheduler: Callable[..., Scheduler] = Scheduler
        if self._tier is not None:
            make_scheduler = partial(TieredScheduler, tier=self._tier)
        self._scheduler = make_scheduler(
            block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=loaded.max_num_batched_tokens,
            eos_token_ids=loaded.eos_token_ids,
            policy=config.scheduling_policy,
            seed=config.seed,
            is_ready=self._is_ready,
            adapters=self._adapters.table,
            speculator=self._make_speculator(config, block_manager),
        )
        run_ahead = config.runs_ahead(loaded.is_asynchronous)
        self._loop = StepLoop(
            self._scheduler,
            worker,
            partial(start_constraints, self._structured),
            run_ahead=run_ahead,
        )

    def _is_ready(self, request: Request) -> bool:
        return self._structured.is_ready(request) and self._trials.admits(request)

    def _make_speculator(
        self, config: EngineConfig, block_manager: BlockManager
    ) -> Speculator | None:
        """Return what drafts tokens, if anything does. Certain drafts come first."""
        if not self._info.speculates:
            return None
        drafters = (
            GrammarDrafter(self._structured.propose),
            PredictionDrafter(),
            CachedDrafter(block_manager),
            NgramDrafter(),
        )
        return Speculator(
            drafters,
            max_draft=config.num_speculative_tokens,
            max_samples=max(config.max_num_seqs, MAX_POSITIONS),
            model=None if config.speculative_model is None else ModelDrafter(),
        )

    def watch_begins(self, on_begin: Callable[[list[str]], None]) -> None:
        """Call `on_begin` with the ids of requests that a step is about to compute anew."""
        self._loop.on_begin = on_begin

    @property
    def info(self) -> EngineInfo:
        """The facts about the engine, with the LoRA adapters that are loaded now."""
        return replace(self._info, adapters=self._adapters.sources)

    @property
    def has_work(self) -> bool:
        return self._loop.has_work

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError if it can never run here."""
        request.check_fits(self._info)
        self._structured.check(request)
        self._scheduler.add_request(request)
        self._structured.add(request)

    @property
    def adapters(self) -> LoadedAdapters:
        """The LoRA adapters, to load and unload them."""
        return self._adapters

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        self._scheduler.abort_request(request_id, choice)

    def step(self) -> StepOutput:
        """Run one step (see `StepLoop.step`) and return its outputs."""
        outputs = self._loop.step()
        self._structured.forget_finished(outputs)
        self._trials.observe(outputs)
        self._adapters.drop_unused()
        stats = self._scheduler.stats()
        if not (outputs or stats.step_tokens):
            self._structured.wait_compiled(COMPILE_WAIT_SECONDS)
            if self._tier is not None:
                self._tier.wait(COMPILE_WAIT_SECONDS)
        return StepOutput(outputs, stats)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def snapshot(self) -> LiveSnapshot:
        """Describe all blocks and sequences, and trace blocks until `end_snapshots`."""
        return take_snapshot(self._scheduler)

    def end_snapshots(self) -> None:
        """Trace blocks no longer."""
        self._scheduler.block_manager.pool.trace = None

    def record_blocks(self, on: bool) -> None:
        """Record what happens to the blocks that can be found, or stop recording."""
        self._scheduler.block_manager.record_blocks(on)

    def take_block_events(self) -> list[BlockEvent]:
        """Return what was recorded since this was last called."""
        if self._tier is not None:
            self._tier.poll()
        return self._scheduler.block_manager.take_block_events()

    def known_blocks(self) -> list[bytes]:
        """Return the hashes of all full blocks that can be found."""
        return self._scheduler.block_manager.known_blocks()

    def reset_prefix_cache(self) -> None:
        """Forget the content of every cached block that no sequence holds."""
        if self._tier is not None:
            self._tier.clear()
        self._scheduler.block_manager.forget_free()

    def close(self) -> None:
        """Let evicted blocks that are on their way to a store arrive there. Called last."""
        if self._tier is not None:
            self._tier.close()


def _make_state_slots(
    config: EngineConfig, loaded: WorkerInfo, num_blocks: int
) -> StateSlots | None:
    """Make the state slots of a model, if its layers keep states. Without room for snapshots of
    those there is no prefix cache."""
    if not loaded.state_bytes:
        return None
    snapshots = loaded.state_snapshots(config, num_blocks)
    interval = loaded.state_interval(config.block_size)
    reach = f"reaches to {snapshots} snapshots of states, one each {interval:,} tokens"
    logger.info(
        "the layers that keep a state have %.1f MB for each of %d sequences; the prefix cache %s; "
        "nothing is drafted",
        loaded.state_bytes / 1e6,
        config.max_num_seqs,
        reach if snapshots else "is off",
    )
    return StateSlots(config.max_num_seqs, snapshots, config.block_size, interval)
