"""Test that steps prepared by the kernel equal those of the CPU's numpy path bit by bit."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from quire.engine.devices.backend import Backend
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cuda.inputs import DeviceInputs
from quire.engine.devices.steps import DeviceStep, HostStep
from quire.engine.runner.input_batch import InputBatch

from ...random_steps import BLOCK_SIZE, MAX_NUM_SEQS, RandomSteps
from ..cuda_on_cpu import interpreted


def make_batch(max_len: int, budget: int, backend: Backend, num_groups: int) -> InputBatch:
    return InputBatch(
        num_groups=num_groups,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_tokens=budget,
        max_model_len=max_len,
        block_size=BLOCK_SIZE,
        backend=backend,
    )


def compare(host: HostStep, found: DeviceStep, wanted: DeviceStep) -> None:
    """Check that every tensor of a step, which may be padded, equals that of the CPU."""
    num_seqs, num_tokens = len(host.order), int(host.query_start_loc[-1])
    padding = len(found.seq_lens) - num_seqs
    mixed = host.max_query_len > 1 and padding > 0
    padded_tokens = len(found.input_ids) - num_tokens
    assert mixed or padded_tokens == padding
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.dtype == reference.dtype
    for name, value in (("input_ids", 0), ("slot_mapping", -1), ("positions", 0)):
        mine = getattr(found, name)
        assert torch.equal(mine[..., :num_tokens], getattr(wanted, name)), name
        assert mine.shape[-1] == num_tokens + padded_tokens
        assert (mine[..., num_tokens:] == value).all()
    assert torch.equal(found.seq_lens[:num_seqs], wanted.seq_lens)
    assert found.seq_lens[num_seqs:].tolist() == [0] * padding
    assert torch.equal(found.logit_indices, wanted.logit_indices)
    assert torch.equal(found.query_start_loc[: num_seqs + 1], wanted.query_start_loc)
    if mixed:
        loc = found.query_start_loc[num_seqs + 1 :].tolist()
        assert loc == [num_tokens + padded_tokens] * padding
    for row, used in enumerate(-(-host.seq_lens // BLOCK_SIZE)):
        assert torch.equal(found.block_table[:, row, :used], wanted.block_table[:, row, :used])


@pytest.mark.parametrize(
    "max_len,budget,num_steps", [(160, 64, 150), (40_000, 5000, 40)], ids=["short", "long"]
)
@pytest.mark.parametrize("sizes", [(), (2, 5)], ids=["plain", "padded"])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_random_steps_equal_those_of_the_cpu(
    max_len: int, budget: int, num_steps: int, sizes: tuple[int, ...], num_groups: int
) -> None:
    """In the long cases, several programs share a prompt or a table."""
    host_batch = make_batch(max_len, budget, CpuBackend(), num_groups)
    device_batch = make_batch(max_len, budget, interpreted(), num_groups)
    assert isinstance(device_batch.inputs, DeviceInputs)
    device_batch.inputs.pad_decodes(sizes)
    device_batch.inputs.pad_mixed([20, 40] if sizes else [])
    steps = RandomSteps(5 * num_groups, max_len, budget, num_groups)
    longest = 0
    for step in islice(steps, num_steps):
        wanted, found = step.prepare_in(host_batch), step.prepare_in(device_batch)
        if wanted is None or found is None:
            assert wanted is found
            continue
        host, expected = wanted
        longest = max(longest, int(host.seq_lens.max()))
        compare(host, found[1], expected)
    assert longest > 0.41 * max_len
    assert steps.seen["unknown"] and steps.seen["copied on write"] and steps.seen["returned"]
