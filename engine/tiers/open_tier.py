"""Makes the tiers that the configuration asks for."""

from __future__ import annotations

import importlib
import json
import logging
import mmap
from hashlib import sha256
from pathlib import Path

from ..cache.block_manager import BlockManager
from ..config import EngineConfig, WorkerInfo
from ..errors import ConfigurationError, one_line
from ..main_memory import available_memory
from ..worker_protocol import WorkerProtocol
from .block_store import BlockStore, MakeStore, StoreFacts
from .block_tier import BlockTier
from .disk_store import DiskStore
from .host_store import HostStore
from .lower_tier import LowerTier
from .sealed_block import HEADER_BYTES
from .transfer_cost import TransferCost

DISK_BYTES = 32 * 2**30
"""Size of the folder if none is given."""
LAYOUT = 1
"""Version of how a block's bytes are laid out in a slot."""

logger = logging.getLogger("quire.engine")


def open_tier(
    config: EngineConfig,
    info: WorkerInfo,
    manager: BlockManager,
    worker: WorkerProtocol,
) -> BlockTier | None:
    """Return the tier for the blocks of a manager, or None if the configuration asks for none.

    The worker has profiled. Raises ConfigurationError if a tier cannot be had.
    """
    size = config.kv_offloading_size
    if size is None:
        return None
    if info.state_bytes:
        raise ConfigurationError(
            "--kv-offloading-size keeps no states, which this model's layers have"
        )
    block_bytes = worker.block_bytes()
    num_slots = size // block_bytes
    if num_slots == 0:
        raise ConfigurationError(
            f"--kv-offloading-size is {size} bytes, but a block takes {block_bytes}: give it more, "
            "with a unit such as 4GiB"
        )
    available = available_memory()
    if available is not None and size > available:
        raise ConfigurationError(
            f"--kv-offloading-size is {size / 2**30:.2f} GiB, but only "
            f"{available / 2**30:.2f} GiB of memory are available"
        )
    lower = _open_lower(config, info, block_bytes)
    memory = memoryview(mmap.mmap(-1, num_slots * block_bytes))
    seconds = worker.attach_host_memory(memory)
    logger.info(
        "evicted KV blocks go to host memory: %d blocks, copied at %.1f GB/s",
        num_slots,
        block_bytes / seconds / 1e9,
    )
    return BlockTier(
        manager,
        HostStore(memory, block_bytes),
        TransferCost(config.block_size, seconds),
        block_bytes,
        lower,
        copies_ended=worker.copies_ended,
    )


def fingerprint(config: EngineConfig, info: WorkerInfo) -> bytes:
    """Return 32 bytes that differ between caches whose blocks must not be exchanged: by the model's
    files, what its values are rounded to, and the layout."""
    facts = [
        LAYOUT,
        info.content,
        info.device.partition(":")[0],
        info.dtype,
        info.kv_cache_dtype,
        info.computed_format,
        info.kv_bytes_per_token,
        info.max_model_len,  # the positions of some models depend on it
        config.block_size,
        config.speculative_model,
        info.draft_kv_bytes_per_token,
    ]
    if info.group_windows != (None,):  # which layers share a block
        facts += [info.group_windows, info.group_layers]
    return sha256(json.dumps(facts).encode()).digest()


def _open_lower(config: EngineConfig, info: WorkerInfo, block_bytes: int) -> LowerTier | None:
    """Open the store below host memory, if there is to be one."""
    own = fingerprint(config, info)
    facts = StoreFacts(own, HEADER_BYTES + block_bytes)
    if config.kv_offloading_disk is not None:
        max_bytes = config.kv_offloading_disk_size or DISK_BYTES
        store = DiskStore(Path(config.kv_offloading_disk), max_bytes, facts.record_bytes)
        return LowerTier(store, own, block_bytes)
    if config.kv_offloading_connector is not None:
        made = _make_store(config.kv_offloading_connector, facts)
        return LowerTier(made, own, block_bytes, name="store")
    return None


def _make_store(name: str, facts: StoreFacts) -> BlockStore:
    """Call the function that a connector's name says. Raises ConfigurationError."""
    module, colon, function = name.partition(":")
    try:
        if not (module and colon and function):
            raise ValueError("it must be MODULE:FUNCTION")
        make: MakeStore = getattr(importlib.import_module(module), function)
        return make(facts)
    except Exception as error:
        raise ConfigurationError(
            f"--kv-offloading-connector {name} cannot be made: {one_line(error)}"
        ) from error
