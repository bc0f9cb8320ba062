"""Steps prepared by the kernel, against those of the CPU's numpy path: every tensor, bit by bit."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from quire.engine.runner import input_batch
from quire.engine.runner.input_batch import DeviceStep, HostStep, InputBatch

from ...random_steps import BLOCK_SIZE, MAX_NUM_SEQS, RandomSteps


def make_batch(max_len: int, budget: int) -> InputBatch:
    return InputBatch(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_tokens=budget,
        max_model_len=max_len,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )


def compare(host: HostStep, found: DeviceStep, wanted: DeviceStep) -> None:
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.dtype == reference.dtype and len(mine) == len(reference)
    for name in ("input_ids", "slot_mapping", "seq_lens", "logit_indices"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    # The CPU leaves the padding of the others as it was.
    num_seqs, num_tokens = len(host.order), int(host.query_start_loc[-1])
    assert torch.equal(found.positions[:num_tokens], wanted.positions[:num_tokens])
    loc = (found.query_start_loc, wanted.query_start_loc)
    assert torch.equal(*(tensor[: num_seqs + 1] for tensor in loc))
    for row, used in enumerate(-(-host.seq_lens // BLOCK_SIZE)):
        assert torch.equal(found.block_table[row, :used], wanted.block_table[row, :used])


@pytest.mark.parametrize(
    "max_len,budget,num_steps", [(160, 64, 150), (40_000, 5000, 40)], ids=["short", "long"]
)
@pytest.mark.parametrize("sizes", [(), (2, 5)], ids=["plain", "padded"])
def test_random_steps_are_those_of_the_cpu(
    max_len: int,
    budget: int,
    num_steps: int,
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and tables of several programs each in the long ones."""
    host_batch = make_batch(max_len, budget)
    monkeypatch.setattr(input_batch, "_has_kernel", lambda device: True)
    device_batch = make_batch(max_len, budget)
    for batch in (host_batch, device_batch):
        batch.inputs.pad_decodes(sizes)
    steps = RandomSteps(5, max_len, budget)
    longest = 0
    for step in islice(steps, num_steps):
        wanted, found = step.give(host_batch), step.give(device_batch)
        if wanted is None or found is None:
            assert wanted is found
            continue
        host, expected = wanted
        longest = max(longest, int(host.seq_lens.max()))
        compare(host, found[1], expected)
    assert longest > 0.41 * max_len
    assert steps.seen["unknown"] and steps.seen["copied on write"] and steps.seen["returned"]
