"""Compare packed inputs with a plain loop over tokens."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from quire.engine.devices.backend import Backend
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cuda.inputs import DeviceInputs
from quire.engine.runner.input_batch import InputBatch
from quire.engine.sequence import Sequence
from quire.engine.step import TableChange

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..random_steps import BLOCK_SIZE, BUDGET, MAX_NUM_SEQS, RandomSteps, Step, make_output
from ..worker_driver import make_sequence

MAX_LEN = 160


def make_batch(backend: Backend, num_groups: int = 1) -> InputBatch:
    return InputBatch(
        num_groups=num_groups,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_tokens=BUDGET,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        backend=backend,
    )


@pytest.fixture(params=[CpuBackend, CudaOnCpuBackend])
def batch(request: pytest.FixtureRequest) -> InputBatch:
    """Prepare steps as the CPU does, and as CUDA does, with the reference of its kernel."""
    return make_batch(request.param())


def check(batch: InputBatch, step: Step, sizes: dict[int, int]) -> None:
    """Compare every field of the prepared step with one made token by token.

    `sizes` maps each number of rows to the number that it is padded to.
    """
    prepared = step.prepare_in(batch)
    if prepared is None:
        return
    host, device = prepared
    output = step.output
    columns = (step.rows, output.num_computed_starts, output.num_new_tokens, step.token_ids)
    rows = list(zip(*columns, strict=True))
    rows = [row for row in rows if row[2] == 1] + [row for row in rows if row[2] > 1]
    assert [step.rows[index] for index in host.order] == [row[0] for row in rows]
    assert [spec.seq_id for spec in host.sequences] == [row[0].seq_id for row in rows]
    ids, positions, loc, logits = [], [], [0], []
    slots: list[list[int]] = [[] for _ in device.slot_mapping]
    for sequence, start, length, token_ids in rows:
        ids += token_ids
        for position in range(start, start + length):
            positions.append(position)
            for group, table in enumerate((sequence.block_table, *sequence.other_tables)):
                block = table[position // BLOCK_SIZE]
                slots[group].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        loc.append(len(ids))
        if start + length == len(sequence.token_ids):
            logits.append(len(ids) - 1)
    assert [host.seq_lens[row] for row in host.sampling_rows] == host.sampled_positions
    size = sizes.get(len(rows), len(rows)) if host.max_query_len == 1 else len(rows)
    padding = size - len(rows)
    assert device.input_ids.tolist() == ids + [0] * padding
    assert device.positions[: len(ids)].tolist() == positions
    assert device.slot_mapping.tolist() == [line + [-1] * padding for line in slots]
    assert device.query_start_loc[: len(loc)].tolist() == loc
    assert device.seq_lens.tolist() == [row[1] + row[2] for row in rows] + [0] * padding
    if padding:
        assert isinstance(batch.inputs, DeviceInputs)
        static_step = batch.inputs.static_step(len(device.seq_lens))
        for mine, static in zip(device, static_step, strict=True):
            assert mine.data_ptr() == static.data_ptr() and mine.stride() == static.stride()
    assert device.logit_indices.tolist() == logits
    assert [loc[row + 1] - 1 for row in host.sampling_rows] == logits
    for row, (sequence, start, length, _) in enumerate(rows):
        used = -(-(start + length) // BLOCK_SIZE)
        blocks = [table[:used] for table in (sequence.block_table, *sequence.other_tables)]
        assert device.block_table[:, row, :used].tolist() == blocks
        assert host.tables[:, host.rows[row], :used].tolist() == blocks
    assert host.num_decodes == sum(row[2] == 1 for row in rows)
    assert host.max_query_len == max(row[2] for row in rows)


def test_random_steps_match_a_plain_loop(batch: InputBatch) -> None:
    check_random_steps(batch, {})


@pytest.mark.parametrize("backend", [CpuBackend, CudaOnCpuBackend])
def test_each_group_of_layers_has_tables_of_its_own(backend: type[Backend]) -> None:
    batch = make_batch(backend(), num_groups=3)
    steps = RandomSteps(4, MAX_LEN, num_groups=3)
    for step in islice(steps, 300):
        check(batch, step, {})
    assert steps.seen["given back"] > 50


def test_decodes_are_padded_to_the_next_size() -> None:
    batch = make_batch(CudaOnCpuBackend())
    assert isinstance(batch.inputs, DeviceInputs)
    batch.inputs.pad_decodes([2, 5])
    assert batch.inputs.static_step(5).slot_mapping.tolist() == [[-1] * 5]
    check_random_steps(batch, {1: 2, 2: 2, 3: 5, 4: 5, 5: 5, 6: 6})


def check_random_steps(batch: InputBatch, sizes: dict[int, int]) -> None:
    steps = RandomSteps(3, MAX_LEN)
    for step in islice(steps, 500):
        check(batch, step, sizes)
    assert len(steps.seen) == 9 and min(steps.seen.values()) > 5, steps.seen


def test_a_sequence_that_returns_to_its_row_is_written_again(batch: InputBatch) -> None:
    """The state kept between steps notices that the sequence gave its row back."""
    first, second = make_sequence(list(range(40)), 1), make_sequence(list(range(40)), 1)
    first.block_table, second.block_table = [1, 2, 3], [4, 5, 6]

    def check_step(new: list[Sequence], released: list[int], changes: list[TableChange]) -> None:
        output = make_output([(first, 20), (second, 20)], new, changes, released)
        token_ids = [list(range(20))] * 2
        nothing = torch.zeros(0, dtype=torch.int64)
        check(batch, Step(output, [first, second], token_ids, [], nothing), {})

    check_step([first, second], [], [])
    check_step([], [], [])
    second.block_table = [9, 8, 7]
    check_step([second], [second.seq_id], [])
    first.block_table[1] = 10
    check_step([], [], [TableChange(first.seq_id, 1, first.block_table[1:])])


def test_a_row_with_a_draft_samples_after_each_of_its_tokens(batch: InputBatch) -> None:
    """The decode stands first in the batch, though it is the second row of the plan."""
    drafted, decode, prompt = (make_sequence(list(range(length)), 9) for length in (40, 33, 7))
    for index, sequence in enumerate((drafted, decode, prompt)):
        sequence.block_table = [3 * index, 3 * index + 1, 3 * index + 2]
    drafted.num_computed_tokens, decode.num_computed_tokens = 39, 32
    output = make_output([(drafted, 1), (decode, 1), (prompt, 5)], [drafted, decode, prompt])
    drafts = [50, 51, 52]
    output = output._replace(
        num_new_tokens=[4, 1, 5],
        token_ids=[39, *drafts, 32, *range(5)],
        drafts={0: drafts},
    )
    batch.apply(output)
    host, device = batch.prepare(output)
    assert host.order == [1, 0, 2]
    assert host.sampling_rows.tolist() == [0, 1, 1, 1, 1]
    assert host.num_drafts == [0, 0, 1, 2, 3]
    assert host.sampled_positions == [33, 40, 41, 42, 43]
    assert device.input_ids.tolist() == [32, 39, *drafts, *range(5)]
    assert device.logit_indices.tolist() == [0, 1, 2, 3, 4]
    assert device.positions.tolist() == [32, 39, 40, 41, 42, *range(5)]
