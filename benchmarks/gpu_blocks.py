"""Check the copies of KV blocks to pinned host memory and back, beside the work of a GPU."""

from __future__ import annotations

import mmap
import random

import torch
from gpu_attention_checks import random_seed
from gpu_common import DEVICE, Record

from quire.engine.devices.streamed_blocks import StreamedBlocks
from quire.engine.step import BlockLoad, BlockSave

NUM_LAYERS, NUM_BLOCKS, NUM_SLOTS, STEPS = 32, 200, 300, 60
MOST = 60
"""Maximum blocks of a step, each way."""
SMALL = {"NUM_LAYERS": 2, "NUM_BLOCKS": 12, "NUM_SLOTS": 20, "STEPS": 10, "MOST": 6}
"""What these are where no GPU is."""


def check_host_blocks(dtype: torch.dtype, heads: int, head_dim: int) -> Record:
    """Check that blocks come back as they were, while steps that nobody waits for write to them.
    The same is done on the device alone, in the order of the launches."""
    shape = (NUM_LAYERS, 2, NUM_BLOCKS, heads, 16, head_dim)
    cache = torch.randn(shape, device=DEVICE).to(dtype)
    wanted = cache.clone()
    size = cache.numel() // NUM_BLOCKS * cache.itemsize
    memory = mmap.mmap(-1, NUM_SLOTS * size)
    blocks = StreamedBlocks([cache], memoryview(memory), torch.device(DEVICE))
    busy = torch.randn(2048, 2048, device=DEVICE)
    slots: dict[int, torch.Tensor] = {}
    rng = random.Random(random_seed())
    for step in range(1, STEPS + 1):
        saved = rng.sample(range(NUM_BLOCKS), rng.choice([0, 1, MOST]))
        saves = list(map(BlockSave, saved, rng.sample(range(NUM_SLOTS), len(saved))))
        for block, slot in saves:
            slots[slot] = wanted[:, :, block].clone()
        loaded = rng.sample(sorted(slots), min(len(slots), rng.choice([0, 1, MOST])))
        loads = list(map(BlockLoad, loaded, rng.sample(range(NUM_BLOCKS), len(loaded))))
        for slot, block in loads:
            wanted[:, :, block] = slots[slot]
        blocks.move(step, saves, loads)
        for block in rng.sample(range(NUM_BLOCKS), MOST // 3):
            cache[:, :, block] = wanted[:, :, block] = step
        busy = torch.tanh(busy @ busy)
    blocks.wait()
    ended = blocks.ended() == STEPS
    found = torch.frombuffer(memory, dtype=dtype).view(NUM_SLOTS, *wanted[:, :, 0].shape)
    differ = sum(not torch.equal(found[slot], one.cpu()) for slot, one in slots.items())
    exact = ended and differ == 0 and torch.equal(cache, wanted)
    return {"error_norm": differ / len(slots), "limit": 0.0, "ok": exact, "exact": exact}
