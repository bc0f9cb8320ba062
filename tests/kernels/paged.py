"""Random paged inputs for attention tests, in which every slot that must not be read is NaN."""

from dataclasses import dataclass

import torch

from quire.kernels.prefix_groups import PrefixGroup


@dataclass(frozen=True)
class PagedInputs:
    """The tensors that the attention kernels take."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float


def paged_inputs(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> PagedInputs:
    """Make sequences of these lengths over shuffled blocks; unused slots and blocks hold NaN."""
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
    needed = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator, device=device).int().tolist()
    table = torch.full((len(seq_lens), max(needed) + 1), -1, dtype=torch.int32)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = torch.full((2, *shape), float("nan"), dtype=dtype, device=device)
    for row, (count, length) in enumerate(zip(needed, seq_lens, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for index, block in enumerate(blocks):
            filled = min(block_size, length - index * block_size)
            caches[:, block, :, :filled] = torch.randn(
                2, num_kv_heads, filled, head_dim, generator=generator, device=device
            ).to(dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    query = torch.randn(
        sum(query_lens), num_heads, head_dim, generator=generator, device=device
    ).to(dtype)
    return PagedInputs(
        query,
        caches[0],
        caches[1],
        table.to(device),
        starts.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        head_dim**-0.5,
    )


def share_prefixes(inputs: PagedInputs, groups: list[PrefixGroup], block_size: int) -> None:
    """Point each member's table at the first member's blocks; the member's own become NaN."""
    for members, length in groups:
        blocks = length // block_size
        first = inputs.block_table[members[0], :blocks]
        for row in members[1:]:
            own = inputs.block_table[row, :blocks].long()
            inputs.key_cache[own] = inputs.value_cache[own] = float("nan")
            inputs.block_table[row, :blocks] = first


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ (Frobenius); NaN if either tensor has a NaN."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
