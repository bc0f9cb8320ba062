"""One step on the device: copy blocks, lay out the batch, forward, sample, bring tokens back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain, product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...kernels.device_copy import to_device
from ...kernels.prefix_groups import MIN_MEMBERS
from ..attention.interface import AttentionMetadata
from ..config import EngineConfig
from ..devices.cuda.decode_graphs import Capture, DecodeGraphs, ModelOutput, NotCapturableError
from ..errors import StepFailedError
from ..model.causal_lm import CausalLM
from ..outputs import BlockCopy, RowError, SchedulerOutput
from ..request import Request
from ..sampling.sampler import Sampler
from ..sampling_params import SamplingParams
from ..sequence import Rank
from ..sequence import Sequence as TokenSequence
from .input_batch import DeviceStep, HostStep, InputBatch
from .pooling import Pooler
from .prompt_logprobs import prompt_logprobs
from .step_results import RowSamples, StepResults

if TYPE_CHECKING:
    from ...kernels.cuda.attention.cascade import CascadeWorkspace
    from ...kernels.cuda.attention.decode_schedule import DecodeWorkspace
    from ..devices.cpu.attention import CpuPlan, CpuPlanner
    from ..devices.cuda.attention import SharedPrefixes
    from ..grammar.masks import TokenMasks

logger = logging.getLogger("quire.engine")


class ModelRunner:
    """Runs steps over one model and one KV cache; keeps what persists between steps."""

    def __init__(
        self,
        model: CausalLM,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        max_model_len: int,
        kv_scales: torch.Tensor | None = None,
    ) -> None:
        """`kv_scales` are those of AttentionMetadata, for a float8 cache."""
        spec = model.spec
        self._model = model
        self._config = config
        self._kv_cache = kv_cache
        self._kv_scales = kv_scales
        self._block_size = config.block_size
        self._batch = InputBatch(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=max(config.token_budget(model.device.type), config.max_num_seqs),
            max_model_len=max_model_len,
            block_size=config.block_size,
            device=model.device,
        )
        self._sampler = Sampler(spec.vocab_size, model.device)
        self._pooler = Pooler()
        self._graphs: DecodeGraphs | None = None
        self._windows = frozenset(spec.windows)
        self._workspaces: dict[int | None, DecodeWorkspace] = {}
        self._shared_prefixes: SharedPrefixes | None = None
        self._cpu_planner: CpuPlanner | None = None
        if model.device.type == "cuda":
            self._allocate_workspaces()
        elif model.device.type == "cpu":
            self._cpu_planner = self._make_cpu_planner()

    def _allocate_workspaces(self) -> None:
        from ..devices.cuda.attention import SharedPrefixes, allocate_workspaces

        config, model = self._config, self._model
        self._workspaces = allocate_workspaces(
            model.spec, self._windows, config.max_num_seqs, model.dtype, model.device
        )
        if not config.disable_cascade_attn:
            self._shared_prefixes = SharedPrefixes.allocate(
                self._workspaces, self._block_size, model.dtype, self._kv_cache.dtype
            )

    def _make_cpu_planner(self) -> CpuPlanner:
        from ..devices.cpu.attention import CpuPlanner

        shares = None in self._windows and not self._config.disable_cascade_attn
        heads = self._model.spec.num_attention_heads
        return CpuPlanner(heads, self._kv_cache, shares=shares)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> StepResults:
        """Begin a step; the device is waited for when its results are called for."""
        self._batch.apply(output)
        self._sampler.forget(output.released)
        self._pooler.forget(output.released)
        try:
            self._copy_blocks(output.block_copies)
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
        """A step of as many tokens as one may have, in as many sequences as may be, all sampling;
        for measuring its memory. Writes nothing to the cache and reads its block 0."""
        device = self._model.device
        num_tokens = self._config.token_budget(device.type)
        num_seqs = min(self._config.max_num_seqs, num_tokens)
        hidden, step = self._run_blank_step(num_tokens, num_seqs)
        logits = self._model.logits(hidden[step.logit_indices])
        # The logits as they are, then a copy that is shaped: of another dtype for the kernel.
        for bias, top_p in product(((), ((0, 1.0),)), (1.0, 0.9)):
            self._sample_blank(
                logits, SamplingParams(max_tokens=1, top_p=top_p, logprobs=0, logit_bias=bias)
            )

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Launch what a step on CUDA may launch, sampling aside, so that no request waits for its
        compilation: decodes, prefills of short and of long rows, a copy of a block to itself."""
        inputs = self._batch.inputs
        inputs.pad_decodes([1])
        for shared in {False, self._shared_prefixes is not None}:
            self._decode(inputs.static_step(1), shared)
        inputs.pad_decodes([])
        for num_tokens in (2, 256):
            self._run_blank_step(num_tokens, 1)
        self._copy_blocks([BlockCopy(0, 0)])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run two tokens and draw from blank logits, of all tokens and of the likeliest, which on
        the CPU compiles what this machine has not compiled before."""
        self._run_blank_step(2, 1)
        logits = torch.zeros(1, self._model.spec.vocab_size, dtype=self._model.dtype)
        for top_p in (1.0, 0.5):
            self._sample_blank(logits, SamplingParams(max_tokens=1, top_p=top_p))

    def _sample_blank(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """One token for each of these rows."""
        request = Request(
            request_id="", prompt_token_ids=(0,), sampling_params=params, arrival_time=0.0
        )
        sampler = Sampler(self._model.spec.vocab_size, logits.device)
        sequences = [
            TokenSequence(request, index, index, Rank(0, index, 0), frozenset())
            for index in range(len(logits))
        ]
        sampler(logits, sampler.prepare(sequences))

    def _run_blank_step(self, num_tokens: int, num_seqs: int) -> tuple[torch.Tensor, DeviceStep]:
        """Hidden states of a step that writes nothing to the cache and reads its first blocks."""
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
        planner = self._cpu_planner
        metadata = AttentionMetadata(
            kv_cache=self._kv_cache,
            slot_mapping=step.slot_mapping,
            block_table=step.block_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            num_decodes=0,
            max_query_len=max(2, int(lengths.max())),
            workspaces=self._workspaces,
            kv_scales=self._kv_scales,
            cpu_plan=None if planner is None else planner.plan(loc.numpy(), lengths.numpy()),
        )
        return self._forward(step, metadata), step

    def capture_graphs(self, capture: Capture, sizes: Sequence[int]) -> None:
        """From now on replay graphs of these sizes (ascending) in decode-only steps, unless the
        model waits for the device within a step."""
        inputs = self._batch.inputs
        inputs.pad_decodes(sizes)
        graphs = DecodeGraphs(self._decode, inputs.static_step, capture)
        try:
            shares = self._shared_prefixes is not None
            graphs.capture(sizes, [size for size in sizes if shares and size >= MIN_MEMBERS])
        except NotCapturableError as error:
            logger.warning("decode steps run without CUDA graphs: %s", error)
            inputs.pad_decodes([])
        else:
            self._graphs = graphs

    def _run_model(self, host: HostStep, step: DeviceStep) -> ModelOutput:
        """Hidden states of all tokens, logits of the sampling rows."""
        size, cascade = len(step.seq_lens), self._find_shared_prefixes(host)
        kind = (size, cascade is not None)
        if self._graphs is not None and host.max_query_len == 1 and kind in self._graphs:
            hidden, logits = self._graphs.replay(*kind)
            num_sampling = len(host.sampling_rows)
            if num_sampling == len(host.order):
                return ModelOutput(hidden, logits[:num_sampling])
            return ModelOutput(hidden, logits[step.logit_indices])
        metadata = self._metadata(host, step, cascade)
        if not len(host.sampling_rows):
            hidden = self._forward(step, metadata)
            return ModelOutput(hidden, hidden.new_empty(0))
        return ModelOutput(
            *self._model.forward_to_logits(
                step.input_ids, step.positions, step.logit_indices, metadata
            )
        )

    def _find_shared_prefixes(self, host: HostStep) -> CascadeWorkspace | None:
        return None if self._shared_prefixes is None else self._shared_prefixes.find(host)

    def _decode(self, step: DeviceStep, shared: bool) -> ModelOutput:
        """A CUDA step in which every row has one token: what a graph captures. It reads nothing
        but the tensors of `step`, the cache and the workspaces."""
        cascade = None
        if shared:
            assert self._shared_prefixes is not None
            cascade = self._shared_prefixes.workspace
        self._schedule_decodes(step.seq_lens, cascade)
        metadata = AttentionMetadata(
            kv_cache=self._kv_cache,
            slot_mapping=step.slot_mapping,
            block_table=step.block_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            num_decodes=len(step.seq_lens),
            max_query_len=1,
            workspaces=self._workspaces,
            kv_scales=self._kv_scales,
            cascade=cascade,
        )
        hidden = self._forward(step, metadata)
        return ModelOutput(hidden, self._model.logits(hidden))

    def _forward(self, step: DeviceStep, metadata: AttentionMetadata) -> torch.Tensor:
        """Hidden states `[T, hidden_size]`; reads nothing but the tensors in its arguments."""
        return self._model.forward(step.input_ids, step.positions, metadata)

    def _schedule_decodes(self, seq_lens: torch.Tensor, cascade: CascadeWorkspace | None) -> None:
        from ..devices.cuda.attention import schedule_decodes

        schedule_decodes(seq_lens, self._workspaces, cascade)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        cache = self._kv_cache
        sources, destinations = to_device(copies, torch.int64, cache.device).T.contiguous()
        if not self._workspaces:  # on the CPU
            cache[:, :, destinations] = cache[:, :, sources]
            return
        from ...kernels.cuda.copy_blocks import copy_blocks

        copy_blocks(cache, sources, destinations)

    def _metadata(
        self, host: HostStep, step: DeviceStep, cascade: CascadeWorkspace | None
    ) -> AttentionMetadata:
        if host.num_decodes and self._workspaces:
            self._schedule_decodes(step.seq_lens[: host.num_decodes], cascade)
        return AttentionMetadata(
            kv_cache=self._kv_cache,
            slot_mapping=step.slot_mapping,
            block_table=step.block_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            num_decodes=host.num_decodes,
            max_query_len=host.max_query_len,
            workspaces=self._workspaces,
            kv_scales=self._kv_scales,
            cascade=cascade,
            cpu_plan=self._cpu_plan(host, step),
        )

    def _cpu_plan(self, host: HostStep, step: DeviceStep) -> CpuPlan | None:
        if self._cpu_planner is None:
            return None
        tables = step.block_table[: host.num_decodes].numpy()
        return self._cpu_planner.plan(host.query_start_loc, host.seq_lens, tables)


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
    filled = torch.from_numpy(masks.wait()[[masks.rows[row] for row in rows]])
    if device.type == "cuda":
        filled = filled.pin_memory()
    return filled.to(device, non_blocking=True)
