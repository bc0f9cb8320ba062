"""Drive a scheduler with the paged fake worker, and check its integrity after every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import count
from typing import Any

from quire.engine.cache.block_manager import BlockManager
from quire.engine.cache.grouped_block_manager import make_block_manager
from quire.engine.cache.state_slots import StateSlots
from quire.engine.core.step_loop import StepLoop
from quire.engine.grammar.constraints import NOTHING_PENDING, PendingConstraints
from quire.engine.outputs import SequenceOutput
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduling.scheduler import Scheduler
from quire.engine.scheduling.tiered_scheduler import TieredScheduler
from quire.engine.sequence import ReadingRow
from quire.engine.step import UNKNOWN_TOKEN
from quire.engine.tiers.block_store import BlockStore
from quire.engine.tiers.block_tier import BlockTier
from quire.engine.tiers.host_store import HostStore
from quire.engine.tiers.lower_tier import LowerTier, Runner
from quire.engine.tiers.transfer_cost import TransferCost

from .paged_fake import SLOT_BYTES, NextToken, PagedFakeWorker, chain, logprobs, next_token

_ids = count()
OWN_FIELDS = {one.name for one in fields(Request)} - {"sampling_params", "prompt_token_ids"}


def prompt(length: int, first: int = 1000) -> list[int]:
    """Return a prompt of consecutive tokens from `first` on."""
    return list(range(first, first + length))


def make_request(prompt: list[int], max_tokens: int = 4, **options: Any) -> Request:
    """Make a request; options that are fields of Request go there, all others to SamplingParams."""
    own = {name: options.pop(name) for name in OWN_FIELDS & options.keys()}
    own.setdefault("request_id", f"r{next(_ids)}")
    own.setdefault("arrival_time", 0.0)
    params = SamplingParams(max_tokens=max_tokens, **options)
    return Request(prompt_token_ids=tuple(prompt), sampling_params=params, **own)


def expected_tokens(prompt: list[int], choice: int, num_tokens: int) -> list[int]:
    """Return the tokens that PagedFakeWorker samples, computed without an engine."""
    history = choice
    for token_id in prompt:
        history = chain(history, token_id)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(history % 97 + 3)
        history = chain(history, tokens[-1])
    return tokens


def expected_beams(
    prompt: list[int], params: SamplingParams, stop_ids: tuple[int, ...] = ()
) -> list[list[int]]:
    """Return the answers of a beam search over PagedFakeWorker's model.

    It considers every continuation of every beam, and its beams are plain lists of tokens.
    """
    width = params.beam_width
    assert width is not None
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, params.max_tokens + 1):
        ranked = sorted(
            (
                (score + logprob, [*tokens, token])
                for score, tokens in beams
                for token, logprob in logprobs(prompt + tokens).items()
                if length > params.min_tokens or token not in stop_ids
            ),
            reverse=True,
        )
        ends = [tokens[-1] in stop_ids or length == params.max_tokens for _, tokens in ranked]
        new = [item for item, end in zip(ranked[:width], ends, strict=False) if end]
        finished += [(score / length**params.length_penalty, tokens) for score, tokens in new]
        finished = sorted(finished, reverse=True)[:width]
        beams = [item for item, end in zip(ranked, ends, strict=True) if not end][:width]
        if len(finished) == width and beams:
            reach = params.max_tokens if params.early_stopping == "never" else length
            reach = length if params.length_penalty <= 0 else reach
            hope = beams[0][0] / reach**params.length_penalty
            if params.early_stopping is True or hope <= finished[-1][0]:
                break
    return [tokens for _, tokens in finished[: params.n]]


FINGERPRINT = b"f" * 32


def make_tier(
    manager: BlockManager,
    worker: PagedFakeWorker,
    num_slots: int,
    store: BlockStore | None,
    clock: Callable[[], float],
    read: Runner | None = None,
    write: Runner | None = None,
) -> BlockTier:
    """Return a tier for the blocks of a fake worker."""
    block_bytes = SLOT_BYTES * manager.block_size
    memory = memoryview(bytearray(num_slots * block_bytes))
    cost = TransferCost(manager.block_size, worker.attach_host_memory(memory))
    lower = None
    if store is not None:
        lower = LowerTier(store, FINGERPRINT, block_bytes, read=read, write=write, clock=clock)
    host, ended = HostStore(memory, block_bytes), worker.copies_ended
    return BlockTier(manager, host, cost, block_bytes, lower, copies_ended=ended, clock=clock)


class Harness:
    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 32,
        budget: int = 256,
        sample: NextToken = next_token,
        prefix_caching: bool = True,
        check: bool = True,
        run_ahead: bool = False,
        snapshots: int | None = None,
        windows: tuple[int | None, ...] = (None,),
        host_slots: int = 0,
        store: BlockStore | None = None,
        read: Runner | None = None,
        write: Runner | None = None,
        **scheduler_fields: Any,
    ) -> None:
        """With `host_slots`, evicted blocks go to host memory, and from there to `store`, if there
        is one; `read` and `write` do what waits for it."""
        self.time = 0.0
        self.check = check
        states = None
        if snapshots is not None:  # the model's layers keep states
            states = StateSlots(max_num_seqs, snapshots, block_size, 2 * block_size)
        self.manager = make_block_manager(
            num_blocks, block_size, windows, enable_prefix_caching=prefix_caching, states=states
        )
        self.worker = PagedFakeWorker(num_blocks, block_size, sample, windows)
        self.tier: BlockTier | None = None
        make_scheduler: Callable[..., Scheduler] = Scheduler
        if host_slots:
            self.tier = make_tier(
                self.manager, self.worker, host_slots, store, self.clock, read, write
            )
            make_scheduler = partial(TieredScheduler, tier=self.tier)
        self.scheduler = make_scheduler(
            self.manager,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            clock=self.clock,
            **scheduler_fields,
        )
        self.loop = StepLoop(
            self.scheduler, self.worker, self._check_reading_rows, run_ahead=run_ahead
        )
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.finals: dict[tuple[str, int], SequenceOutput] = {}

    def clock(self) -> float:
        return self.time

    def add(self, prompt: list[int], max_tokens: int = 4, **fields: Any) -> Request:
        request = make_request(prompt, max_tokens, **fields)
        self.scheduler.add_request(request)
        return request

    def step(self) -> list[SequenceOutput]:
        outputs = self.loop.step()
        for output in outputs:
            key = (output.request_id, output.choice)
            assert key not in self.finals, f"{key} goes on after its end"
            self.tokens[key] += output.token_ids
            if output.finish_reason is not None:
                self.finals[key] = output
        if self.check:
            self.check_integrity()
        return outputs

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.loop.has_work:
                return
            self.step()
        raise AssertionError("work is left: something waits for ever")

    def _check_reading_rows(self, rows: list[ReadingRow]) -> PendingConstraints:
        for _, sequence, _ in rows:
            assert sequence.reads_tokens and UNKNOWN_TOKEN not in sequence.token_ids
        return NOTHING_PENDING

    def check_integrity(self) -> None:
        scheduler = self.scheduler
        assert scheduler.stats().step_tokens <= scheduler.budget.max_tokens
        self.manager.check_integrity(scheduler.running)
        if self.tier is not None:
            self.tier.host.check_integrity()
        assert len(scheduler.running) <= scheduler.max_num_seqs
        ranks = [sequence.rank for sequence in scheduler.running]
        assert ranks == sorted(ranks)

    def assert_all_free(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
