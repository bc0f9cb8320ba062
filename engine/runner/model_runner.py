"""One step on the device: copy blocks, lay out the batch, forward, sample, bring tokens back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain, product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...kernels.device_copy import upload
from ..attention.metadata import AttentionMetadata, AttentionPlan
from ..config import EngineConfig
from ..devices.backend import Backend, Graphs, Planner
from ..devices.steps import DeviceStep, GraphKey, HostStep, ModelOutput, StepInputs
from ..errors import StepFailedError
from ..model.causal_lm import CausalLM
from ..outputs import BlockCopy, RowError, SchedulerOutput
from ..request import Request
from ..sampling_params import SamplingParams
from ..sequence import Rank
from ..sequence import Sequence as TokenSequence
from .input_batch import InputBatch
from .pooling import Pooler
from .prompt_logprobs import prompt_logprobs
from .step_results import RowSamples, StepResults

if TYPE_CHECKING:
    from ..grammar.masks import TokenMasks

logger = logging.getLogger("quire.engine")


class ModelRunner:
    """Runs steps over one model and one KV cache; keeps what persists between steps."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        max_model_len: int,
        kv_scales: torch.Tensor | None = None,
    ) -> None:
        """`kv_scales` are those of AttentionMetadata, for a float8 cache."""
        spec = model.spec
        self._model = model
        self._backend = backend
        self._config = config
        self._kv_cache = kv_cache
        self._kv_scales = kv_scales
        self._block_size = config.block_size
        self._batch = InputBatch(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=max(backend.token_budget(config), config.max_num_seqs),
            max_model_len=max_model_len,
            block_size=config.block_size,
            backend=backend,
        )
        self._sampler = backend.make_sampler(spec.vocab_size)
        self._pooler = Pooler()
        self.planner: Planner = backend.make_planner(
            config, kv_cache, spec.num_attention_heads, frozenset(spec.windows), model.dtype
        )
        self._graphs: Graphs | None = None

    @property
    def inputs(self) -> StepInputs:
        """Makes the tensors of each step."""
        return self._batch.inputs

    def prepare(self) -> None:
        """Compile or capture what steps will need: see `Backend.prepare`."""
        self._graphs = self._backend.prepare(self, self._config)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> StepResults:
        """Begin a step; the device is waited for when its results are called for."""
        self._batch.apply(output)
        self._sampler.forget(output.released)
        self._pooler.forget(output.released)
        try:
            self.copy_blocks(output.block_copies)
        except torch.OutOfMemoryError as error:  # no later step would make up for them
            raise RuntimeError("out of device memory for the copies of blocks") from error
        if not output.sequences:
            return StepResults(0, [], [], [], {}, {})
        host, step = self._batch.prepare(output)
        hidden, logits = self._run_model(host, step)
        chunks = prompt_logprobs(self._model, host, hidden) if host.any_scored else []
        errors: dict[int, RowError] = {}
        samples: list[RowSamples] = []
        masks = None
        if len(host.sampling_rows):
            masks = output.before_sampling()
            rows, sequences, last_ids = host.order, host.sequences, step.input_ids
            if len(host.sampling_rows) < len(step.input_ids):
                picks = host.sampling_rows.tolist()
                rows = [host.order[row] for row in picks]
                sequences = [host.sequences[row] for row in picks]
                last_ids = last_ids[step.logit_indices]
            places = host.sampled_positions
            samples = self._sample(rows, sequences, places, logits, last_ids, errors, masks)
        # Last, since a step that runs out of memory before its end is tried again.
        pooled = self._pooler(host, hidden) if host.pooled_rows else []
        if samples:
            self._batch.keep_samples(*_joined(samples))
        mask_errors = masks.errors if masks is not None else {}
        return StepResults(len(host.order), samples, chunks, pooled, errors, mask_errors)

    def _sample(
        self,
        rows: list[int],
        sequences: list[TokenSequence],
        positions: list[int],
        logits: torch.Tensor,
        last_ids: torch.Tensor,
        errors: dict[int, RowError],
        masks: TokenMasks | None,
    ) -> list[RowSamples]:
        """Sample all rows at once; should that raise, each by itself, so that it costs the
        offender alone. Raises where every row fails: then the fault is not a row's."""
        try:
            constrained = []
            if masks:
                constrained = [at for at, row in enumerate(rows) if row in masks.rows]
            batch = self._sampler.prepare(
                sequences,
                positions=positions,
                constrained_rows=constrained,
                last_token_ids=last_ids,
            )
            bitmask = None
            if masks and constrained:
                bitmask = _bitmask(masks, [rows[at] for at in constrained], logits.device)
            return [RowSamples(rows, sequences, batch, self._sampler(logits, batch, bitmask))]
        except Exception as error:
            if _is_fault_of_device(error):
                raise
            if len(rows) == 1:
                logger.exception("sampling %s failed", sequences[0])
                errors[rows[0]] = RowError(StepFailedError.code, "its row raised in the sampler")
                return []
            alone = [
                self._sample(
                    [row],
                    [sequences[at]],
                    [positions[at]],
                    logits[at, None],
                    last_ids[at, None],
                    errors,
                    masks,
                )
                for at, row in enumerate(rows)
            ]
            samples = list(chain.from_iterable(alone))
            if not samples:
                raise
            return samples

    @torch.inference_mode()
    def run_largest_step(self) -> None:
        """Run a blank step of as many tokens as a step may have, in as many sequences as it may
        have, and sample all of them; for measuring its memory."""
        num_tokens = self._backend.token_budget(self._config)
        num_seqs = min(self._config.max_num_seqs, num_tokens)
        hidden, step = self.run_prompts(num_tokens, num_seqs)
        logits = self._model.logits(hidden[step.logit_indices])
        # The logits as they are, then a copy with a bias, which is float32 for the kernel.
        for bias, top_p in product(((), ((0, 1.0),)), (1.0, 0.9)):
            self._sample_blank(
                logits, SamplingParams(max_tokens=1, top_p=top_p, logprobs=0, logit_bias=bias)
            )

    @torch.inference_mode()
    def sample_blank(self, top_p: float) -> None:
        """Draw a token from logits that are all zero."""
        size, device = self._model.spec.vocab_size, self._model.device
        logits = torch.zeros(1, size, dtype=self._model.dtype, device=device)
        self._sample_blank(logits, SamplingParams(max_tokens=1, top_p=top_p))

    def _sample_blank(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """One token for each of these rows."""
        request = Request(
            request_id="", prompt_token_ids=(0,), sampling_params=params, arrival_time=0.0
        )
        sampler = self._backend.make_sampler(self._model.spec.vocab_size)
        sequences = [
            TokenSequence(request, index, index, Rank(0, index, 0), frozenset())
            for index in range(len(logits))
        ]
        sampler(logits, sampler.prepare(sequences))

    @torch.inference_mode()
    def run_prompts(self, num_tokens: int, num_seqs: int) -> tuple[torch.Tensor, DeviceStep]:
        """Run a blank step of sequences that begin, all of about the same length. It writes nothing
        to the cache and reads its first blocks. Returns its hidden states."""
        device = self._model.device
        lengths = torch.full((num_seqs,), num_tokens // num_seqs, dtype=torch.int32)
        lengths[: num_tokens % num_seqs] += 1
        loc = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        width = -(-int(lengths.max()) // self._block_size)
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        step = DeviceStep(
            input_ids=zeros,
            positions=zeros,
            slot_mapping=torch.full_like(zeros, -1),
            block_table=torch.zeros((num_seqs, width), dtype=torch.int32, device=device),
            query_start_loc=loc.to(device),
            seq_lens=lengths.to(device),
            logit_indices=(loc[1:] - 1).to(device, torch.int64),
        )
        plan = self.planner.plan(loc.numpy(), lengths.numpy(), 0, step)
        metadata = self._metadata(step, 0, max(2, int(lengths.max())), plan)
        return self._forward(step, metadata), step

    @torch.inference_mode()
    def run_decodes(self, step: DeviceStep, plan: AttentionPlan) -> ModelOutput:
        """Run a step in which every row has one token, with logits for each: what a graph captures.
        It reads no tensors but those of the step, the plan and the cache."""
        hidden = self._forward(step, self._metadata(step, len(step.seq_lens), 1, plan))
        return ModelOutput(hidden, self._model.logits(hidden))

    def _run_model(self, host: HostStep, step: DeviceStep) -> ModelOutput:
        """Return hidden states of all tokens and logits of the sampling rows."""
        shared = self.planner.find_shared(host)
        key = GraphKey(len(step.seq_lens), shared)
        # 1. Replay a graph, if there is one. It has logits for every row.
        if self._graphs is not None and host.max_query_len == 1 and key in self._graphs:
            hidden, logits = self._graphs.replay(key)
            num_sampling = len(host.sampling_rows)
            if num_sampling == len(host.order):
                return ModelOutput(hidden, logits[:num_sampling])
            return ModelOutput(hidden, logits[step.logit_indices])
        # 2. Otherwise run the model.
        decodes = host.num_decodes
        plan = self.planner.plan(host.query_start_loc, host.seq_lens, decodes, step, shared=shared)
        metadata = self._metadata(step, decodes, host.max_query_len, plan)
        if not len(host.sampling_rows):
            hidden = self._forward(step, metadata)
            return ModelOutput(hidden, hidden.new_empty(0))
        return ModelOutput(
            *self._model.forward_to_logits(
                step.input_ids, step.positions, step.logit_indices, metadata
            )
        )

    def _forward(self, step: DeviceStep, metadata: AttentionMetadata) -> torch.Tensor:
        """Return hidden states `[T, hidden_size]`; reads no tensors but those in its arguments."""
        return self._model.forward(step.input_ids, step.positions, metadata)

    def _metadata(
        self, step: DeviceStep, num_decodes: int, max_query_len: int, plan: AttentionPlan
    ) -> AttentionMetadata:
        return AttentionMetadata(
            kv_cache=self._kv_cache,
            slot_mapping=step.slot_mapping,
            block_table=step.block_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            plan=plan,
            kv_scales=self._kv_scales,
        )

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks of the cache."""
        if copies:
            self._backend.copy_blocks(self._kv_cache, copies)


def _joined(samples: list[RowSamples]) -> tuple[list[TokenSequence], torch.Tensor]:
    """Whose tokens were sampled, and which; several where rows were sampled one by one."""
    if len(samples) == 1:
        return samples[0].sequences, samples[0].output.token_ids
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    return sequences, torch.cat([sample.output.token_ids for sample in samples])


def _is_fault_of_device(error: Exception) -> bool:
    """Whether it says nothing about the rows: torch has types for most such errors, Triton and the
    libraries below raise RuntimeErrors that name CUDA."""
    types = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, types) or (isinstance(error, RuntimeError) and "CUDA" in str(error))


def _bitmask(masks: TokenMasks, rows: list[int], device: torch.device) -> torch.Tensor:
    """`[C, W]` int32 on the device, once the masks of these rows of the scheduler's output are
    filled."""
    return upload(torch.from_numpy(masks.wait()[[masks.rows[row] for row in rows]]), device)
