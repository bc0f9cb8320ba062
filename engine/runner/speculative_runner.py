"""A model runner with a draft model beside it, for speculative decoding.

Both models have a KV cache with the same blocks, so that one block table serves both: what is said
of a block (its owner, its hash, the tokens whose K and V it holds) is true in both caches. For that
the draft model computes all tokens that the served model computes, in the same step and slots,
without logits; and blocks are copied in both.

To draft k tokens, the draft model runs k passes with one token for each row: the sequence's last
token, then its own guesses. A guess is drawn by the row's sampling parameters and the same keys
(seed, position, token id) as the served model's token will be: then it is accepted more often than
if it were the likeliest one (the coupling of arXiv 2408.07978).
"""

from __future__ import annotations

from collections import abc
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import EngineConfig
from ..devices.backend import Backend
from ..devices.steps import DeviceStep, HostStep, ModelOutput
from ..model.causal_lm import CausalLM
from ..step import BlockCopy, SchedulerOutput, SequenceSpec
from .input_batch import InputBatch
from .model_runner import ModelRunner


class DraftRunner(ModelRunner):
    """Runs the draft model over the rows of another runner's `batch`."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        max_model_len: int,
        *,
        batch: InputBatch,
        vocab_size: int,
    ) -> None:
        """`vocab_size` is the width of the served model's logits."""
        super().__init__(model, backend, config, kv_cache, max_model_len, batch=batch)
        self._vocab_size = vocab_size
        self._missing = max(vocab_size - model.spec.vocab_size, 0)
        """Ids that the served model's logits have and the draft model does not know. Those of a
        family often differ in their padding."""
        self._sampler = backend.make_sampler(vocab_size)
        self._specs: dict[int, SequenceSpec] = {}
        """By seq_id, how a sequence's drafts are drawn."""

    def prepare(self) -> None:
        super().prepare()
        if self._missing:  # the ids would have to be bounded in the graphs' own tensors
            self._graphs = None

    def forget(self, released: list[int]) -> None:
        """Drop what is kept for sequences that left."""
        self._sampler.forget(released)
        for seq_id in released:
            self._specs.pop(seq_id, None)

    def compute(self, host: HostStep, step: DeviceStep) -> None:
        """Compute K and V of a step's tokens."""
        nothing = host._replace(sampling_rows=host.sampling_rows[:0], token_slots=None)
        self._run_model(nothing, step, picked_only=True)

    def propose(self, output: SchedulerOutput) -> dict[int, list[int]]:
        """Return the drafts that a plan leaves to the worker, by row. It has begun."""
        wanted = output.rows_to_propose
        # 1. The longest first: the rows of each pass are the first ones of the pass before.
        rows = sorted(wanted, key=lambda row: -wanted[row])
        counts = np.array([wanted[row] for row in rows])
        firsts = np.cumsum(output.num_new_tokens) - output.num_new_tokens
        token_ids = np.array(output.token_ids, dtype=np.int64)[firsts[rows]]
        starts = np.array(output.num_computed_starts, dtype=np.int64)[rows]
        # 2. One token further in each pass. Its guesses stay on the device.
        sampled = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        passes = []
        for place in range(counts[0]):
            active = int(np.count_nonzero(counts > place))
            host, step = self._batch.prepare_tokens(
                rows[:active], starts[:active] + place, token_ids[:active], sampled
            )
            sampled = self._draw(host, self._run_model(host, step, picked_only=True))
            passes.append(sampled)
            token_ids = -1 - np.arange(active)
        # 3. All guesses at once to the host, by row.
        guesses = iter(torch.cat(passes).tolist())
        drafts: dict[int, list[int]] = {row: [] for row in rows}
        for tokens in passes:
            for row in rows[: len(tokens)]:
                drafts[row].append(next(guesses))
        return drafts

    def _draw(self, host: HostStep, output: ModelOutput) -> torch.Tensor:
        """Draw the next token of each row as the served model's is drawn, `[R]` int64.

        What depends on the tokens before (penalties, bad words, grammars) is left out."""
        logits, best = output.logits, output.best
        if logits.shape[1] != self._vocab_size:
            logits = F.pad(logits, (0, self._missing), value=-torch.inf)[:, : self._vocab_size]
            best = None
        sequences = [self._spec_of(sequence) for sequence in host.sequences]
        batch = self._sampler.prepare(sequences, host.sampled_positions)
        # A copy: the best tokens may lie where the next pass writes its own.
        return self._sampler(logits, batch, found=best).token_ids.clone()

    def _spec_of(self, sequence: SequenceSpec) -> SequenceSpec:
        known = self._specs.get(sequence.seq_id)
        if known is None:
            params = replace(
                sequence.sampling_params,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                bad_words=(),
            )
            known = sequence._replace(sampling_params=params, num_logprobs=None)
            self._specs[sequence.seq_id] = known
        return known

    def _run_model(
        self, host: HostStep, step: DeviceStep, *, picked_only: bool = False
    ) -> ModelOutput:
        if self._missing:
            largest = self._model.spec.vocab_size - 1
            step = step._replace(input_ids=step.input_ids.clamp(max=largest))
        return super()._run_model(host, step, picked_only=picked_only)


class SpeculativeRunner(ModelRunner):
    """Runs steps over the served model, and the same ones over its draft model."""

    def __init__(
        self,
        model: CausalLM,
        *arguments: Any,
        draft_model: CausalLM,
        draft_cache: torch.Tensor,
    ) -> None:
        """The `arguments` are those of ModelRunner; the others belong to the draft model. A float8
        cache of its has scales of 1."""
        super().__init__(model, *arguments)
        backend, config, _, max_model_len, *_ = arguments
        self._draft = DraftRunner(
            draft_model,
            backend,
            config,
            draft_cache,
            max_model_len,
            batch=self._batch,
            vocab_size=model.spec.vocab_size,
        )

    @property
    def draft(self) -> DraftRunner:
        return self._draft

    def prepare(self) -> None:
        self._draft.prepare()
        super().prepare()

    def begin(self, output: SchedulerOutput) -> None:
        super().begin(output)
        self._draft.forget(output.released)

    @torch.inference_mode()
    def propose(self, output: SchedulerOutput) -> dict[int, list[int]]:
        """Implement `Launcher.propose`."""
        self.begin(output)
        with self._memory_errors_named():
            return self._draft.propose(output)

    def run_largest_step(self) -> None:
        super().run_largest_step()
        self._draft.run_largest_step()

    def copy_blocks(self, copies: abc.Sequence[BlockCopy]) -> None:
        super().copy_blocks(copies)
        self._draft.copy_blocks(copies)

    def _run_model(
        self, host: HostStep, step: DeviceStep, *, picked_only: bool = False
    ) -> ModelOutput:
        output = super()._run_model(host, step, picked_only=picked_only)
        self._draft.compute(host, step)
        return output
