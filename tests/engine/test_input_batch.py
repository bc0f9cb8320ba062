"""Packed inputs, against a plain loop over tokens."""

from __future__ import annotations

import random

import pytest
import torch

from quire.engine.input_batch import InputBatch
from quire.engine.outputs import SchedulerOutput, TableChange
from quire.engine.sequence import Sequence

from .worker_driver import make_sequence

BLOCK_SIZE = 16
MAX_LEN = 160


def make_batch(max_num_seqs: int = 6) -> InputBatch:
    return InputBatch(
        max_num_seqs=max_num_seqs,
        max_num_tokens=64,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )


def make_output(
    rows: list[tuple[Sequence, int]],
    changes: list[TableChange] | None = None,
    released: list[int] | None = None,
) -> SchedulerOutput:
    return SchedulerOutput(
        step=0,
        sequences=[sequence for sequence, _ in rows],
        num_computed_starts=[sequence.num_computed_tokens for sequence, _ in rows],
        num_new_tokens=[length for _, length in rows],
        total_tokens=sum(length for _, length in rows),
        block_copies=[],
        table_changes=changes or [],
        released=released or [],
    )


def check(batch: InputBatch, output: SchedulerOutput, sizes: dict[int, int]) -> None:
    """Run the step's preparation and compare every field with one made token by token. `sizes`
    says to how many rows each number of them is padded."""
    batch.apply(output)
    host, device = batch.prepare(output)
    columns = (output.sequences, output.num_computed_starts, output.num_new_tokens)
    rows = list(zip(*columns, strict=True))
    rows = [row for row in rows if row[2] == 1] + [row for row in rows if row[2] > 1]
    assert [output.sequences[index] for index in host.order] == [row[0] for row in rows]
    assert host.sequences == [row[0] for row in rows]
    ids, positions, slots, loc, logits = [], [], [], [0], []
    for sequence, start, length in rows:
        for position in range(start, start + length):
            ids.append(sequence.token_ids[position])
            positions.append(position)
            block = sequence.block_table[position // BLOCK_SIZE]
            slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        loc.append(len(ids))
        if start + length == len(sequence.token_ids):
            logits.append(len(ids) - 1)
    assert [host.seq_lens[row] for row in host.sampling_rows] == host.sampled_positions
    size = sizes.get(len(rows), len(rows)) if host.max_query_len == 1 else len(rows)
    padding = size - len(rows)
    assert device.input_ids.tolist() == ids + [0] * padding
    assert device.positions[: len(ids)].tolist() == positions
    assert device.slot_mapping.tolist() == slots + [-1] * padding
    assert device.query_start_loc[: len(loc)].tolist() == loc
    assert device.seq_lens.tolist() == [start + n for _, start, n in rows] + [0] * padding
    if padding:
        for mine, static in zip(device, batch.static_step(len(device.seq_lens)), strict=True):
            assert mine.data_ptr() == static.data_ptr() and mine.stride() == static.stride()
    assert device.logit_indices.tolist() == logits
    assert [loc[row + 1] - 1 for row in host.sampling_rows] == logits
    for row, (sequence, start, length) in enumerate(rows):
        used = -(-(start + length) // BLOCK_SIZE)
        assert device.block_table[row, :used].tolist() == sequence.block_table[:used]
    assert host.num_decodes == sum(length == 1 for _, _, length in rows)
    assert host.max_query_len == max(length for _, _, length in rows)


@pytest.mark.parametrize("padded", [False, True])
def test_random_steps_match_a_plain_loop(padded: bool) -> None:
    """Arrivals, growth, re-written tables, releases and returns, with few rows to spare."""
    rng = random.Random(3)
    batch = make_batch()
    sizes = {}
    if padded:
        sizes = {1: 2, 2: 2, 3: 5, 4: 5, 5: 5, 6: 6}
        batch.pad_decodes([2, 5])
    running: list[Sequence] = []
    known: set[int] = set()
    waiting: list[Sequence] = []
    seen = {"mixed": 0, "returned": 0, "rewritten": 0, "left out": 0, "padded": 0}
    for _ in range(300):
        released = []
        for sequence in list(running):
            if rng.random() < 0.1:
                running.remove(sequence)
                released.append(sequence.seq_id)
                known.discard(sequence.seq_id)
                sequence.num_computed_tokens = 0
                sequence.block_table = []
                if len(sequence.token_ids) < MAX_LEN - 20:
                    waiting.append(sequence)
        while len(running) < 6 and rng.random() < 0.5:
            if waiting and rng.random() < 0.5:
                running.append(waiting.pop())
                seen["returned"] += running[-1].seq_id in released
            else:
                prompt = [rng.randrange(128) for _ in range(rng.randint(1, 70))]
                running.append(make_sequence(prompt, 8))
        rows, changes, left = [], [], 64
        for sequence in running:
            left_to_do = len(sequence.token_ids) - sequence.num_computed_tokens
            length = min(left, rng.randint(1, left_to_do) if left_to_do > 1 else 1)
            if length == 0 or rng.random() < 0.1:
                seen["left out"] += 1
                continue
            left -= length
            held = len(sequence.block_table)
            first = held
            if held and rng.random() < 0.1:  # copy on write of the tail
                first = held - 1
                sequence.block_table.pop()
                seen["rewritten"] += 1
            while len(sequence.block_table) * BLOCK_SIZE < sequence.num_computed_tokens + length:
                sequence.block_table.append(rng.randrange(1000))
            if sequence.seq_id in known and len(sequence.block_table) > first:
                changes.append(TableChange(sequence, first))
            known.add(sequence.seq_id)
            rows.append((sequence, length))
        output = make_output(rows, changes, released)
        if not rows:
            batch.apply(output)
            continue
        seen["mixed"] += 1 in output.num_new_tokens and max(output.num_new_tokens) > 1
        seen["padded"] += max(output.num_new_tokens) == 1
        check(batch, output, sizes)
        for sequence, length in rows:
            sequence.num_computed_tokens += length
            if sequence.num_computed_tokens == len(sequence.token_ids):
                if len(sequence.token_ids) < MAX_LEN - 1:
                    sequence.token_ids.append(rng.randrange(128))
                else:
                    sequence.num_computed_tokens -= 1
    assert min(seen.values()) > 5, seen


def test_the_same_sequences_again_after_one_gave_its_row_back() -> None:
    """What is kept from step to step knows of it."""
    batch = make_batch()
    first, second = make_sequence(list(range(40)), 1), make_sequence(list(range(40)), 1)
    first.block_table, second.block_table = [1, 2, 3], [4, 5, 6]
    output = make_output([(first, 20), (second, 20)])
    check(batch, output, {})
    check(batch, output, {})
    second.block_table = [9, 8, 7]
    check(batch, make_output([(first, 20), (second, 20)], released=[second.seq_id]), {})
    first.block_table[1] = 10
    changes = [TableChange(first, 1)]
    check(batch, make_output([(first, 20), (second, 20)], changes), {})
