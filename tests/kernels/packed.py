"""Random steps as arguments of `prepare_inputs`, with all its outputs filled with −7 beforehand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quire.kernels.cuda.prepare_inputs import FIELDS


class PackedStep(NamedTuple):
    """The arguments of one call of `prepare_inputs`."""

    tensors: tuple[torch.Tensor, ...]
    """The tensors, in the order of the parameters; of a mixed step num_decodes_out, too."""
    num_seqs: int
    reach: int
    block_size: int
    query_len: int
    mixed: tuple[int, int] | None = None
    """Tokens and decodes of a padded mixed step."""

    def launch(self, prepare: Callable[..., None]) -> None:
        """Call `prepare` (the kernel's launcher or the reference) on these tensors."""
        options: dict[str, Any] = {}
        if self.mixed is not None:
            options = dict(zip(("num_tokens", "num_decodes"), self.mixed, strict=True))
            options["num_decodes_out"] = self.tensors[10]
        prepare(
            *self.tensors[:10],
            num_seqs=self.num_seqs,
            reach=self.reach,
            block_size=self.block_size,
            query_len=self.query_len,
            **options,
        )

    def run(self, prepare: Callable[..., None]) -> tuple[torch.Tensor, ...]:
        """Call `prepare` on copies of the tensors and return the copies."""
        copy = self._replace(tensors=tuple(tensor.clone() for tensor in self.tensors))
        copy.launch(prepare)
        return copy.tensors


def packed_step(
    starts: list[int],
    lengths: list[int],
    *,
    block_size: int = 16,
    padding: int = 0,
    changed: float = 0.5,
    device: str = "cpu",
    seed: int = 0,
    query_len: int = 1,
    mixed_padding: int | None = None,
    groups: int = 1,
) -> PackedStep:  # over 50 lines: it builds ten tensors
    """Make a random step whose row i has lengths[i] new tokens after starts[i] old ones.

    Rows with one new token come first. A share `changed` of the rows has table columns that the
    device does not know. Half of the tokens that may be unknown to the host are unknown. Half of
    the rows sample: some after their last token, others after several, up to all of their tokens.
    With a `query_len` above 1, each row has room for so many tokens. A mixed step may be padded by
    `mixed_padding` tokens, and by at least one row. Each of several `groups` of layers has a table
    of its own for each row, and other columns that the device does not know.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(max(high, 1), shape, generator=generator)

    num_seqs, decodes = len(starts), lengths.count(1)
    num_tokens = sum(lengths) + (padding if mixed_padding is None else mixed_padding)
    if query_len > 1:
        num_tokens = (num_seqs + padding) * query_len
    used = [-(-(a + b) // block_size) for a, b in zip(starts, lengths, strict=True)]
    max_blocks = max(used, default=1) + 3
    rows = torch.randperm(num_seqs + 3, generator=generator)[:num_seqs].tolist()
    ids = draw(50_000, sum(lengths[decodes:])).tolist()
    blocks: list[int] = []
    ids_at, records, first, num_samples = groups * num_seqs * FIELDS, [], 0, 0
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        token = ids_at + first - decodes
        if length == 1:
            token = int(draw(50_000)) if int(draw(2)) else -1 - int(draw(num_seqs))
        samples = int(draw(2)) * (1 + int(draw(2)) * int(draw(length)))
        place = first if query_len == 1 else i * query_len
        for group in range(groups):
            is_changed = float(torch.rand(1, generator=generator)) < changed
            known = int(draw(used[i])) if is_changed else used[i]
            row, at = group * (num_seqs + 3) + rows[i], ids_at + len(ids) + len(blocks)
            record = [row, start, length, place, token, known, at, num_samples, samples]
            records.append((group, record))
            blocks += draw(2**27, used[i] - known).tolist()
        first, num_samples = first + length, num_samples + samples
    records.sort(key=lambda one: one[0])
    flat = [number for _, record in records for number in record]
    size = num_seqs + padding

    def unwritten(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=dtype)

    tensors = (
        torch.tensor([*flat, *ids, *blocks], dtype=torch.int32),
        draw(50_000, max(num_seqs, 1)),
        draw(2**27, groups * (num_seqs + 3), max_blocks).int(),
        *(unwritten(torch.int64, num_tokens) for _ in range(2)),
        unwritten(torch.int64, groups, num_tokens),
        unwritten(torch.int32, groups, size, max_blocks),
        unwritten(torch.int32, size + 1),
        unwritten(torch.int32, size),
        unwritten(torch.int64, max(num_tokens, 1)),
        unwritten(torch.int32, 1),
    )
    return PackedStep(
        tuple(tensor.to(device) for tensor in tensors),
        num_seqs,
        max([*lengths, *used, mixed_padding or 0], default=0),
        block_size,
        query_len,
        None if mixed_padding is None else (sum(lengths), decodes),
    )
