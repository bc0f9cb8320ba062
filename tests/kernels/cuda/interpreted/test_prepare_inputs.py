"""Compare a step's inputs with the oracle's bit by bit, including tables and padding."""

import random

import pytest
import torch
from packed import PackedStep, packed_step

from quire.kernels import reference
from quire.kernels.cuda.prepare_inputs import PART, prepare_inputs


def check(step: PackedStep) -> None:
    for found, wanted in zip(
        step.run(prepare_inputs), step.run(reference.prepare_inputs), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("block_size", [16, 64])
def test_random_mixed_steps(block_size: int) -> None:
    rng = random.Random(0)
    for seed in range(60):
        lengths = [1] * rng.randrange(5)
        lengths += [rng.randint(2, 90) for _ in range(rng.randrange(0 if lengths else 1, 4))]
        starts = [rng.choice([0, 15, 16, rng.randrange(500)]) for _ in lengths]
        padding = rng.randrange(3) if lengths.count(1) == len(lengths) else 0
        changed = rng.choice([0.0, 0.5, 1.0])
        check(
            packed_step(
                starts,
                lengths,
                block_size=block_size,
                padding=padding,
                changed=changed,
                seed=seed,
                groups=rng.randint(1, 3),
            )
        )


@pytest.mark.parametrize("query_len", [2, 5, 8])
def test_rows_padded_to_the_same_number_of_tokens(query_len: int) -> None:
    """Rows with drafts, and rows of nothing but padding, among slots where only the rows' own
    tokens write."""
    rng = random.Random(query_len)
    for seed in range(10):
        lengths = sorted(rng.randint(1, query_len) for _ in range(rng.randrange(6)))
        starts = [rng.choice([0, 15, 16, rng.randrange(500)]) for _ in lengths]
        padding = rng.randrange(0 if lengths else 1, 4)
        options = {"padding": padding, "seed": seed, "query_len": query_len}
        step = packed_step(starts, lengths, groups=2, **options)
        check(step)
        slots, loc, seq_lens = (step.run(prepare_inputs)[index] for index in (5, 7, 8))
        assert int((slots >= 0).sum()) == 2 * sum(lengths)
        assert loc.diff()[: len(lengths)].tolist() == [query_len] * len(lengths)
        ends = [start + query_len for start in starts]
        assert seq_lens.tolist() == ends + [0] * padding


def test_mixed_steps_are_padded_at_their_end() -> None:
    """The row after the step's own has all tokens of the padding, which may fill several programs;
    the rows after it have none."""
    rng = random.Random(5)
    for seed in range(12):
        lengths = [1] * rng.randrange(4) + [rng.randint(2, 90) for _ in range(rng.randrange(3))]
        starts = [rng.choice([0, 15, 16, rng.randrange(500)]) for _ in lengths]
        tokens = rng.choice([0, 1, 7, PART, PART + 3]) if lengths else 9
        rows = rng.randint(1, 3)
        step = packed_step(starts, lengths, padding=rows, seed=seed, mixed_padding=tokens)
        check(step)
        found, total = step.run(prepare_inputs), sum(lengths)
        assert found[10].tolist() == [lengths.count(1)]
        assert found[7].tolist()[len(lengths) :] == [total] + [total + tokens] * rows
        assert found[8].tolist()[len(lengths) :] == [0] * rows
        assert found[5][0].tolist()[total:] == [-1] * tokens


@pytest.mark.parametrize("changed", [0.0, 1.0])
def test_rows_that_span_several_programs(changed: float) -> None:
    """The new tokens and columns fill a program's part exactly, or exceed it by one."""
    lengths = [1, 1, PART, PART + 1, 2 * PART + 7]
    starts = [16 * PART - 1, 16 * PART, 3, 40 * PART, 0]
    check(packed_step(starts, lengths, changed=changed))


def test_a_step_with_only_padding() -> None:
    step = packed_step([], [], padding=3)
    check(step)
    ids, positions, slots, _, _, seq_lens, *_ = step.run(prepare_inputs)[3:]
    assert [ids.tolist(), positions.tolist(), slots.tolist()] == [[0] * 3, [0] * 3, [[-1] * 3]]
    assert seq_lens.tolist() == [0] * 3


def test_blocks_past_32_bits_of_slots() -> None:
    """The product of a block id and the block size exceeds 2³¹."""
    step = packed_step([100], [3], block_size=256, changed=1.0)
    blocks = step.tensors[0][-1:]
    blocks[:] = 2**27 - 1
    slots = step.run(prepare_inputs)[5][0]
    assert slots.tolist() == [(2**27 - 1) * 256 + 100 + i for i in range(3)]
    check(step)


@pytest.mark.parametrize(
    "argument,change",
    [
        (0, lambda x: x.long()),
        (0, lambda x: x[:15]),
        (1, lambda x: x.int()),
        (2, lambda x: x[:, :-1]),
        (2, lambda x: x.long()),
        (3, lambda x: x[:-1]),
        (4, lambda x: x.int()),
        (5, lambda x: x.int()),
        (5, lambda x: x[:, :-1]),
        (6, lambda x: x[:, :-1]),
        (7, lambda x: x[:-1]),
        (8, lambda x: x[:1]),
        (9, lambda x: x.int()),
        (9, lambda x: x.to("meta")),
    ],
)
def test_refusals(argument: int, change: object) -> None:
    step = packed_step([5, 0], [1, 4])
    tensors = list(step.tensors)
    tensors[argument] = change(tensors[argument])  # type: ignore[operator]
    with pytest.raises(ValueError):
        step._replace(tensors=tuple(tensors)).run(prepare_inputs)


def test_mixed_steps_are_not_padded() -> None:
    """A padded row in a step with several tokens per row would be written out of bounds."""
    step = packed_step([5, 0], [1, 4])
    with pytest.raises(ValueError, match="padded"):
        step._replace(num_seqs=1).run(prepare_inputs)
