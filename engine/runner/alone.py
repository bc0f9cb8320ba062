"""A step whose tokens are computed one at a time, so that none depends on the others.

Matrix libraries choose their order of summation by the shape of a product. If every forward has one
token, every product has one row, and what a token gets depends only on its own sequence: on the
token, its position, and the K/V before it, which came about in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ..adapters.slots import AdapterSlots
from ..attention.metadata import AttentionMetadata, AttentionPlan
from ..devices.backend import Planner
from ..devices.steps import DeviceStep, HostStep, ModelOutput
from ..model.causal_lm import CausalLM

MakeMetadata = Callable[[DeviceStep, int, int, AttentionPlan], AttentionMetadata]
"""A step, its number of decodes, its longest row, and its plan → what its attention must know."""

_LOC = np.array([0, 1], np.int32)
"""The query_start_loc of a step of one token."""


def run_alone(
    model: CausalLM,
    planner: Planner,
    adapters: AdapterSlots | None,
    host: HostStep,
    step: DeviceStep,
    make_metadata: MakeMetadata,
) -> ModelOutput:
    """Return hidden states of all tokens and logits of the sampling rows.

    Each token is a step of its own, a decode of its sequence, in the order of the rows. (No row
    reads what another one of the same step writes.)
    """
    rows = np.repeat(np.arange(len(host.lengths)), host.lengths)
    wanted = step.logit_indices.tolist() if len(host.sampling_rows) else []
    hidden = []
    for token, row in enumerate(rows.tolist()):
        seq_lens = step.positions[token : token + 1].to(torch.int32) + 1
        one = DeviceStep(
            input_ids=step.input_ids[token : token + 1],
            positions=step.positions[token : token + 1],
            slot_mapping=step.slot_mapping[:, token : token + 1],
            block_table=step.block_table[:, row : row + 1],
            query_start_loc=torch.from_numpy(_LOC),
            seq_lens=seq_lens,
            logit_indices=step.logit_indices[:0],
        )
        if adapters is not None:
            slots = host.token_slots
            adapters.begin_step(None if slots is None else slots[token : token + 1])
        metadata = make_metadata(one, 1, 1, planner.plan(_LOC, seq_lens.numpy(), 1, one))
        if metadata.states is not None:
            metadata = replace(metadata, states=metadata.states.of_token(row, token))
        # A copy: a compiled body's result is valid only until its next call.
        hidden.append(model.forward(one.input_ids, one.positions, metadata).clone())
    states = torch.cat(hidden)
    return ModelOutput(states, model.logits(states[wanted]) if wanted else states.new_empty(0))
