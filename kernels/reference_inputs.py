"""The plain-torch reference of the kernel that lays out a step, as in `reference.py`."""

import torch


def prepare_inputs(
    packed: torch.Tensor,
    sampled: torch.Tensor,
    table: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    logit_indices: torch.Tensor,
    *,
    num_seqs: int,
    reach: int,
    block_size: int,
    query_len: int = 1,
    num_tokens: int | None = None,
    num_decodes: int = 0,
    num_decodes_out: torch.Tensor | None = None,
) -> None:  # over 50 lines: eleven tensors to write
    """Build a step's inputs from one packed upload and the tables that stay on the device.

    The arguments are those of the kernel, whose file defines the layout of `packed`. `reach` is
    unused here.
    """
    query_start_loc[0] = 0
    groups = len(slot_mapping)
    records = packed[: groups * num_seqs * 9].view(groups * num_seqs, 9).tolist()
    for number, record in enumerate(records):
        group, index = divmod(number, num_seqs)
        row, start, length, first, token, known, blocks, sample, num_samples = record
        end = start + length
        used = -(-end // block_size)
        table[row, known:used] = packed[blocks : blocks + max(used - known, 0)]
        block_table[group, index, :used] = table[row, :used]
        own = slice(first, first + length)
        positions[own] = torch.arange(start, end, device=positions.device)
        held = table[row, positions[own] // block_size].long()
        slot_mapping[group, own] = held * block_size + positions[own] % block_size
        if length > 1:
            input_ids[own] = packed[token : token + length].long()
        else:
            input_ids[own] = token if token >= 0 else sampled[-1 - token]
        padded = max(length, query_len)
        query_start_loc[index + 1] = first + padded
        seq_lens[index] = start + padded
        rest = slice(own.stop, first + padded)
        input_ids[rest] = positions[rest] = 0
        slot_mapping[group, rest] = -1
        samples = slice(sample, sample + num_samples)
        ends = torch.arange(own.stop - num_samples, own.stop, device=logit_indices.device)
        logit_indices[samples] = ends
    if num_decodes_out is not None:
        num_decodes_out[0] = num_decodes
    if len(seq_lens) > num_seqs:
        end = num_seqs * query_len if num_decodes_out is None else num_tokens or 0
        input_ids[end:] = positions[end:] = 0
        slot_mapping[:, end:] = -1
        query_start_loc[num_seqs + 1 :] = end if num_decodes_out is None else len(input_ids)
        seq_lens[num_seqs:] = 0
