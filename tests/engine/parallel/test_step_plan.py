"""A follower lays out the very steps that rank 0 lays out, from nothing but the bytes of plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.steps import DeviceStep, HostStep
from quire.engine.parallel import messages
from quire.engine.parallel.step_plan import StepPlan, make_plan
from quire.engine.runner.input_batch import InputBatch
from quire.engine.sequence import Sequence
from quire.engine.step import SchedulerOutput
from quire.engine.worker_protocol import Forward

from ..harness import Harness, expected_tokens, prompt
from ..random_steps import make_output
from ..speculation.drafters import RandomDrafter, always


class FollowedWorker:
    """A worker whose every plan is also laid out by a follower, which must find the same."""

    def __init__(self, harness: Harness, max_num_seqs: int) -> None:
        self._worker = harness.worker
        sizes = {"max_num_seqs": max_num_seqs, "max_num_tokens": 256, "max_model_len": 1024}
        backend = CpuBackend()
        self._leader, self._follower = (
            InputBatch(
                **sizes,
                block_size=16,
                backend=backend,
                num_groups=len(harness.worker.windows),
                records_tables=True,
            )
            for _ in range(2)
        )
        self._reader = self._follower.make_reader()
        self.seen: set[str] = set()

    def forward(self, output: SchedulerOutput) -> Forward:
        self._leader.apply(output)
        host, token_ids = None, np.empty(0, dtype=np.int64)
        if output.seq_ids:
            host, token_ids = self._leader.lay_out(output)
        entries, self._leader.table_entries = self._leader.table_entries, []
        plan = make_plan(output, host, token_ids, entries, extra_logits=[], num_fed_back=0)
        step = messages.decode_to_follower(messages.encode(messages.Step(plan)))
        assert isinstance(step, messages.Step) and step.plan == plan
        assert [list(copy) for copy in plan.copies] == [list(one) for one in output.block_copies]
        self._compare(step.plan, host, token_ids)
        if host is not None:
            sequences = [host.sequences[row] for row in host.sampling_rows]
            self._leader.keep_samples(sequences, torch.zeros(256, dtype=torch.int64))
        forward: Forward = self._worker.forward(output)
        return forward

    def _compare(self, plan: StepPlan, host: HostStep | None, token_ids: NDArray[np.int64]) -> None:
        read = self._reader.read(plan)
        if host is None or read is None:
            assert host is read
            return
        assert np.array_equal(read[1], token_ids)
        for name in ("starts", "lengths", "sampling_rows", "query_start_loc", "seq_lens", "rows"):
            one, other = getattr(host, name), getattr(read[0], name)
            assert np.array_equal(one, other) and one.dtype == other.dtype, name
        for name in ("num_decodes", "max_query_len", "sampled_positions", "num_drafts"):
            assert getattr(host, name) == getattr(read[0], name), name
        # The tensors of the step are all that a device sees. Unknown tokens are −1 − i of these.
        sampled = torch.arange(256)
        given: list[DeviceStep] = [
            batch.inputs.write(one, token_ids, sampled)
            for batch, one in ((self._leader, host), (self._follower, read[0]))
        ]
        for row in range(len(host.order)):
            used = -(-int(host.seq_lens[row]) // 16)
            tables = [step.block_table[:, row, :used].tolist() for step in given]
            assert tables[0] == tables[1]
        for one, other in zip(
            *(step._replace(block_table=step.seq_lens) for step in given), strict=True
        ):
            assert one.equal(other)
        self.seen |= {name for name in ("num_drafts", "pooled_rows") if getattr(host, name)}
        self.seen |= {"unknown"} if (token_ids < 0).any() else set()
        self.seen |= {"copies"} if plan.copies else set()
        self.seen |= {"mixed"} if 0 < plan.num_decodes < plan.num_seqs else set()


def _answers(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt_token_ids)
    return expected_tokens(tokens, sequence.choice, sequence.request.sampling_params.max_tokens)


def run(
    *,
    num_blocks: int,
    budget: int,
    run_ahead: bool,
    drafts: bool,
    windows: tuple[int | None, ...],
    requests: list[Any],
) -> set[str]:
    fields: dict[str, Any] = {}
    if drafts:
        fields["speculator"] = always(RandomDrafter(_answers, 0.6, 3))
    harness = Harness(
        num_blocks=num_blocks * len(windows) + 2 * budget // 16,
        budget=budget,
        max_num_seqs=6,
        run_ahead=run_ahead,
        windows=windows,
        **fields,
    )
    worker = FollowedWorker(harness, 6)
    harness.loop._worker = worker  # type: ignore[assignment]
    for index, (length, max_tokens, n, same) in enumerate(requests):
        first = 1000 if same else 1000 * index
        harness.add(prompt(length, first), min(max_tokens, num_blocks * 16 - length), n=n)
    harness.run()
    return worker.seen


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(12, 40),
    budget=st.integers(4, 64),
    run_ahead=st.booleans(),
    drafts=st.booleans(),
    windows=st.sampled_from([(None,), (None, 20), (24,)]),
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=8,
    ),
)
def test_a_follower_finds_every_step(
    num_blocks: int,
    budget: int,
    run_ahead: bool,
    drafts: bool,
    windows: tuple[int | None, ...],
    requests: list[Any],
) -> None:
    run(
        windows=windows,
        num_blocks=num_blocks,
        budget=budget,
        run_ahead=run_ahead,
        drafts=drafts,
        requests=requests,
    )


def test_the_steps_are_of_all_kinds() -> None:
    requests = [(40, 12, 3, True), (17, 20, 2, True), (60, 9, 1, False), (3, 30, 2, False)]
    common: dict[str, Any] = {"num_blocks": 14, "budget": 24, "requests": requests}
    common["windows"] = (None,)
    assert run(**common, run_ahead=True, drafts=False) >= {"unknown", "copies", "mixed"}
    assert run(**common, run_ahead=False, drafts=True) >= {"num_drafts", "mixed"}


def test_a_decode_of_256_rows_takes_six_kilobytes() -> None:
    batch = InputBatch(
        max_num_seqs=256, max_num_tokens=256, max_model_len=64, block_size=16, backend=CpuBackend()
    )
    sizes = np.full(256, 1, dtype=np.int64)
    host = HostStep(
        order=list(range(256)),
        sequences=[],
        starts=40 * sizes,
        lengths=sizes,
        num_decodes=256,
        max_query_len=1,
        sampling_rows=np.arange(256),
        sampled_positions=[41] * 256,
        num_drafts=[],
        pooled_rows=[],
        any_scored=False,
        query_start_loc=np.arange(257, dtype=np.int32),
        seq_lens=(41 * sizes).astype(np.int32),
        rows=np.arange(256),
        tables=np.zeros((1, 256, 3), dtype=np.int32),
    )
    plan = make_plan(make_output([]), host, sizes, [], extra_logits=[], num_fed_back=0)
    assert len(messages.encode(messages.Step(plan))) < 6 * 1024 + 64
    assert batch.make_reader().read(plan) is not None
