"""The KV cache's tensor, and how many blocks it has.

Layout `[num_places, 2, num_blocks, num_kv_heads, block_size, head_dim]`: a (block, head) tile is
contiguous, which is what the attention kernels read. A tile of int8 has STEP_BYTES more for each
token, in the last dimension: the float32 that its integers are multiplied by. Of latents there is
one part in the place of K and V: [num_places, 1, num_blocks, 1, block_size, width].

There is a place for each layer of the largest group (engine/layers). If a group has a window, one
more block follows those of the pool: the null block, which block tables have in place of those that
no token needs any more. Kernels may read it, as the part of a tile that lies before a window, and
give its keys no weight. It is never written, and holds zeros.
"""

from __future__ import annotations

import torch

from ..config import SNAPSHOT_SHARE, EngineConfig, WorkerInfo
from ..devices.backend import Backend
from ..errors import ConfigurationError
from ..layers.layer_groups import LayerGroups, blocks_needed, longest_that_fits
from ..model.model_spec import ModelSpec

STEP_BYTES = 4


def token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the bytes of one token over all layers, K and V."""
    return spec.kv_bytes_per_token(dtype.itemsize, _step_bytes(dtype))


def choose_groups(config: EngineConfig, spec: ModelSpec, max_model_len: int) -> LayerGroups:
    """Return the groups of a model's layers. There is one if each of several stages has a part of
    the layers, if a draft model shares the block tables, and if layers keep a state, whose
    snapshots say how far a prefix reaches."""
    if (
        config.pipeline_parallel_size > 1
        or config.speculative_model is not None
        or spec.state is not None
    ):
        return LayerGroups.one_table(len(spec.lines.windows))
    return LayerGroups.choose(spec.lines.windows, max_model_len, config.block_size)


MAX_TABLE_ENTRIES = 2**28
"""Maximum entries of the block tables of all sequences of a step: three arrays of 1 GiB each."""


def block_bytes(spec: ModelSpec, groups: LayerGroups, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block, K and V of one group's layers."""
    return block_size * groups.num_places * (token_bytes(spec, dtype) // len(spec.lines.windows))


def _step_bytes(dtype: torch.dtype) -> int:
    return STEP_BYTES if dtype == torch.int8 else 0


def allocate_kv_cache(
    backend: Backend,
    spec: ModelSpec,
    groups: LayerGroups,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    commit: bool = False,
) -> torch.Tensor:
    """Allocate the zeroed cache of a pool of `num_blocks` blocks; `commit` as in
    `Backend.allocate_kv_cache`. Raises ConfigurationError if the device has no room for it."""
    width = spec.head_dim + _step_bytes(dtype)
    all_blocks = num_blocks + groups.frees_blocks
    shape = (groups.num_places, spec.kv_parts, all_blocks, spec.num_kv_heads, block_size, width)
    try:
        return backend.allocate_kv_cache(shape, dtype, commit=commit)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        size = _gib(all_blocks * block_bytes(spec, groups, block_size, dtype))
        raise ConfigurationError(
            f"a KV cache of {num_blocks} blocks ({size}) does not fit the memory of "
            f"{backend.device}"
        ) from error


def check_tables(config: EngineConfig, groups: LayerGroups, max_model_len: int) -> None:
    """Raise ConfigurationError if the block tables of a step would take too much memory."""
    entries = config.max_num_seqs * (max_model_len // config.block_size + 1) * len(groups.groups)
    if entries > MAX_TABLE_ENTRIES:
        raise ConfigurationError(
            f"block tables for --max-num-seqs {config.max_num_seqs} sequences of {max_model_len} "
            f"tokens would have {entries} entries; the limit is {MAX_TABLE_ENTRIES}: lower "
            "--max-num-seqs or --max-model-len, or raise --block-size"
        )


def seats_beside_blocks(
    memory: int,
    config: EngineConfig,
    info: WorkerInfo,
    own_bytes: int,
    block_bytes: int,
    step_tokens: int,
) -> int:
    """Return how many sequences may run with `memory` bytes for their states and for blocks:
    max_num_seqs, unless that may be lowered and their states leave too little for the blocks of one
    sequence of full length. Then the states take half of the memory, or less. `own_bytes` are those
    of a state on this rank."""
    if not config.lowers_max_num_seqs or config.num_blocks is not None:
        return config.max_num_seqs
    longest, size = info.max_model_len - 1, config.block_size
    least = block_bytes * blocks_needed(info.group_windows, size, longest, step_tokens=step_tokens)
    blocks, both = _shares(config, info, own_bytes, block_bytes)
    least = -(-least * both // blocks)
    most = (memory - least) // own_bytes
    if most >= config.max_num_seqs:
        return config.max_num_seqs
    return max(1, min(most, memory // (2 * own_bytes)))


def memory_beside_states(
    memory: int, config: EngineConfig, info: WorkerInfo, own_bytes: int, block_bytes: int
) -> int:
    """Return what is left of `memory` bytes for blocks of `block_bytes`: the states of max_num_seqs
    sequences come first, and snapshots of states take a share of the rest. `own_bytes` are those
    of a state on this rank.

    Raises ConfigurationError if the states leave nothing, unless the number of blocks is given.
    """
    left = memory - config.max_num_seqs * own_bytes
    if left <= 0 and config.num_blocks is None:
        raise ConfigurationError(
            f"the states of {config.max_num_seqs} sequences ({own_bytes / 1e6:.1f} MB each) "
            f"leave nothing of {_gib(memory)} for the KV cache: lower --max-num-seqs to "
            f"{max(memory // (2 * own_bytes), 1)} or less, or give it more memory"
        )
    blocks, both = _shares(config, info, own_bytes, block_bytes)
    return left * blocks // both


def _shares(
    config: EngineConfig, info: WorkerInfo, own_bytes: int, block_bytes: int
) -> tuple[int, int]:
    """Return how blocks, and blocks with snapshots, share out this rank's memory. Snapshots have a
    share of the bytes of the whole model's blocks, which may be another one of this rank's: a stage
    may have few layers with K and V."""
    if not config.enable_prefix_caching:
        return 1, 1
    blocks = SNAPSHOT_SHARE * block_bytes * info.state_bytes
    snapshots = own_bytes * config.block_size * info.kv_bytes_per_token
    return blocks, blocks + snapshots


def num_blocks_from_memory(
    memory: int,
    config: EngineConfig,
    groups: LayerGroups,
    block_bytes: int,
    max_model_len: int,
    step_tokens: int,
) -> int:
    """Return how many blocks the pool may have if blocks of `block_bytes` are to fit into `memory`
    bytes, or `config.num_blocks` if that is given.

    Raises ConfigurationError if not even one sequence of max_model_len tokens would fit.
    `step_tokens` are those of steps whose results have not arrived.
    """
    size, num_blocks = block_bytes, config.num_blocks
    if num_blocks is None:
        num_blocks = max(memory, 0) // size - groups.frees_blocks
    if num_blocks <= 0:
        raise ConfigurationError(
            f"no memory is left for the KV cache ({_gib(memory)} beside the model; a block takes "
            f"{size} bytes): use a smaller model or raise --gpu-memory-utilization"
        )
    # The last token of a sequence is never fed back, so it needs no slot.
    longest, windows = max_model_len - 1, groups.windows
    needed = blocks_needed(windows, config.block_size, longest, step_tokens=step_tokens)
    if needed > num_blocks:
        fit = longest_that_fits(
            windows, config.block_size, num_blocks, longest, step_tokens=step_tokens
        )
        chunk = ", lower --max-num-batched-tokens," if groups.frees_blocks else ""
        raise ConfigurationError(
            f"the KV cache holds {fit} tokens, less than one sequence of {max_model_len}: give it "
            f"more memory{chunk} or set --max-model-len {fit} or less"
        )
    return num_blocks


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
