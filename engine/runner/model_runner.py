"""One step on the device: copy blocks, lay out the batch, forward, sample, bring tokens back."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..adapters.slots import AdapterSlots
from ..attention.metadata import AttentionMetadata, AttentionPlan
from ..config import EngineConfig
from ..devices.backend import Backend, Graphs, HostBlocks, Planner
from ..devices.steps import DeviceStep, GraphKey, HostStep, ModelOutput, StepInputs
from ..errors import DeviceMemoryError
from ..layers.layer_groups import LayerGroups
from ..model.causal_lm import CausalLM
from ..outputs import RowError
from ..parallel.ranks import ALONE, Ranks
from ..parallel.step_plan import StepPlan
from ..request import Request
from ..sampling.draws import BestTokens
from ..sampling_params import SamplingParams
from ..sequence import Rank, Sequence
from ..step import BlockCopy, SamplingConstraints, SchedulerOutput
from .adapter_store import AdapterStore
from .alone import run_alone
from .input_batch import InputBatch
from .pending_results import PendingResults
from .plan_sender import PlanSender
from .pooling import Pooler
from .prompt_logprobs import PromptChunk, prompt_logprobs
from .row_sampling import RowSamples, joined, sample_rows, sampling_rows
from .state_store import make_state_store, state_rows


class ModelRunner:
    """Runs steps over one model and one KV cache; keeps what persists between steps."""

    # Over 50 lines: half of them are arguments and what they say.
    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        max_model_len: int,
        kv_scales: torch.Tensor | None = None,
        adapters: AdapterStore | None = None,
        batch: InputBatch | None = None,
        ranks: Ranks = ALONE,
        num_state_slots: int = 1,
        groups: LayerGroups | None = None,
    ) -> None:
        """`kv_scales` are those of AttentionMetadata, for a float8 cache. `groups` are of layers
        with block tables of their own, by default one. Without `adapters` no sequence has one.
        `batch` is that of another runner, if this one computes its steps, as other `ranks` do."""
        spec, leads = model.spec, ranks.size > 1 and ranks.rank == 0
        self._model = model
        self._backend = backend
        self._config = config
        self._kv_cache = kv_cache
        self._kv_scales = kv_scales
        self._adapters = adapters
        self._ranks = ranks
        self._block_size = config.block_size
        groups = groups or LayerGroups.one_table(len(spec.lines.windows))
        self._num_groups = len(groups.groups)
        self._places = groups.places_of(spec.lines.of_layer)
        self._batch = batch or InputBatch(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=max(backend.token_budget(config), config.max_num_seqs),
            max_model_len=max_model_len,
            block_size=config.block_size,
            backend=backend,
            num_groups=self._num_groups,
            records_tables=leads,
        )
        self._states = make_state_store(config, spec.state, backend, num_state_slots)
        self._plans: PlanSender | None = None
        if leads:
            stays = backend.is_asynchronous
            self._plans = PlanSender(ranks, self._batch, spec, stays_on_device=stays)
        self._reader = None if ranks.rank == 0 else self._batch.make_reader()
        self._sampler = backend.make_sampler(spec.vocab_size)
        self._pooler = Pooler(model.scores)
        self.planner: Planner = backend.make_planner(
            config, kv_cache, spec.num_attention_heads, spec.attention_shapes, model.dtype
        )
        self._graphs: Graphs | None = None
        self.host_blocks: HostBlocks | None = None
        self._last_results: PendingResults | None = None

    @property
    def adapters(self) -> AdapterSlots | None:
        """The slots of LoRA adapters, if there are any."""
        return None if self._adapters is None else self._adapters.slots

    @property
    def inputs(self) -> StepInputs:
        """Makes the tensors of each step."""
        return self._batch.inputs

    @property
    def num_graphs(self) -> int:
        """How many kinds of steps are captured."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def num_parameters(self) -> int:
        """The number of the model's parameters."""
        return self._model.num_parameters

    def prepare(self) -> None:
        """Compile or capture what steps will need: see `Backend.prepare`."""
        self._graphs = self._backend.prepare(self, self._config)

    @property
    def draft(self) -> ModelRunner | None:
        """The runner of the draft model, which computes the same steps, if there is one."""
        return None

    @property
    def kv_cache(self) -> torch.Tensor:
        """The KV cache of this model; a draft model has one of its own."""
        return self._kv_cache

    def begin(self, output: SchedulerOutput) -> None:
        """Carry out what a plan says must come before its forward."""
        self._batch.apply(output)
        self._sampler.forget(output.released)
        self._pooler.forget(output.released)
        if output.adapter_loads:
            assert self._adapters is not None
            self._adapters.fill(output.adapter_loads)
        try:
            if self._states is not None:
                self._states.copy(output.state_copies)
            if self.host_blocks is not None:
                self.host_blocks.move(output.step, output.block_saves, output.block_loads)
            self.copy_blocks(output.block_copies)
        except torch.OutOfMemoryError as error:  # no later step would make up for them
            raise RuntimeError("out of device memory for copies of blocks and states") from error

    @torch.inference_mode()
    def forward(self, output: SchedulerOutput) -> StepForward:
        """Begin a step: block copies, then the forward. Nothing here waits for a GPU."""
        self.begin(output)
        laid_out = self._batch.lay_out(output) if output.seq_ids else None
        if laid_out is not None and self._states is not None:
            host, token_ids = laid_out
            rows = state_rows(host, output.state_saves)
            laid_out = host._replace(states=rows), token_ids
            self._states.begin_step(rows)
        if self._plans is not None:
            self._plans.send(output, *(laid_out or ()))
        if laid_out is None:
            return StepForward(self, None)
        host, step = laid_out[0], self._batch.write(*laid_out)
        with self._memory_errors_named():
            computed = self._run_model(host, step, picked_only=not host.reads_hidden)
            hidden = computed.hidden
            chunks = prompt_logprobs(self._model, host, hidden) if host.any_scored else []
        return StepForward(self, _Computed(host, step, computed, chunks))

    @torch.inference_mode()
    def sample(self, computed: _Computed, constraints: SamplingConstraints) -> PendingResults:
        """Sample the rows of a step whose forward has begun, and pool those to be pooled."""
        host, step, output, chunks = computed
        errors: dict[int, RowError] = {}
        samples: list[RowSamples] = []
        sampled = None
        with self._memory_errors_named():
            if len(host.sampling_rows):
                rows = sampling_rows(host, step, output)
                samples = sample_rows(self._sampler, rows, constraints, errors)
                sampled = joined(samples) if samples else None
            # Last, since a step that runs out of memory before its end is tried again.
            pooled = self._pooler(host, output.hidden) if host.pooled_rows else []
        if sampled is not None:
            self._batch.keep_samples(*sampled)
        self._last_results = PendingResults(len(host.order), samples, chunks, pooled, errors)
        return self._last_results

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Run the forward of a step that rank 0 has planned."""
        if plan.adapter_loads:
            assert self._adapters is not None
            self._adapters.fill(plan.adapter_loads)
        if self._states is not None:
            self._states.copy(plan.state_copies)
        if self.host_blocks is not None:
            self.host_blocks.move(plan.step, plan.saves, plan.loads)
        self.copy_blocks(plan.copies)
        assert self._reader is not None
        read = self._reader.read(plan)
        if read is None:
            return
        host, token_ids = read
        if self._states is not None and host.states is not None:
            self._states.begin_step(host.states)
        device = self._model.device
        sampled = torch.zeros(max(1, plan.num_fed_back), dtype=torch.int64, device=device)
        if plan.num_fed_back and self._model.has_ends:
            self._ranks.group.broadcast(sampled)
        hidden = self._run_model(host, self.inputs.write(host, token_ids, sampled)).hidden
        if self._model.has_ends:
            for begin, end in plan.extra_logits:
                self._model.logits(hidden[begin:end])

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
            Sequence(request, index, index, Rank(0, index, 0), frozenset()).spec()
            for index in range(len(logits))
        ]
        sampler(logits, sampler.prepare(sequences))

    @torch.inference_mode()
    def run_prompts(self, num_tokens: int, num_seqs: int) -> tuple[torch.Tensor, DeviceStep]:
        """Run a blank step of sequences that begin, all of about the same length. It writes nothing
        to the cache and reads its first blocks. Returns its hidden states."""
        device, groups = self._model.device, self._num_groups
        lengths = torch.full((num_seqs,), num_tokens // num_seqs, dtype=torch.int32)
        lengths[: num_tokens % num_seqs] += 1
        loc = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        width = -(-int(lengths.max()) // self._block_size)
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        step = DeviceStep(
            input_ids=zeros,
            positions=zeros,
            slot_mapping=torch.full((groups, num_tokens), -1, device=device),
            block_table=torch.zeros((groups, num_seqs, width), dtype=torch.int32, device=device),
            query_start_loc=loc.to(device),
            seq_lens=lengths.to(device),
            logit_indices=(loc[1:] - 1).to(device, torch.int64),
        )
        plan = self.planner.plan(loc.numpy(), lengths.numpy(), 0, step)
        metadata = self._metadata(step, 0, max(2, int(lengths.max())), plan)
        return self._forward(step, metadata), step

    @torch.inference_mode()
    def run_decodes(
        self, step: DeviceStep, plan: AttentionPlan, logits: torch.Tensor | None = None
    ) -> ModelOutput:
        """Run a step in which every row has the same number of tokens, with logits for each: what a
        graph captures. It reads no tensors but those of the step, the plan and the cache."""
        hidden = self._forward(step, self._metadata(step, len(step.seq_lens), 1, plan))
        return ModelOutput(hidden, self._model.logits(hidden, out=logits))

    @torch.inference_mode()
    def run_mixed(self, step: DeviceStep, plan: AttentionPlan) -> torch.Tensor:
        """Run a padded mixed step, without logits: what a graph captures. It reads no tensors but
        those of the step, the plan and the cache."""
        return self._forward(step, self._metadata(step, 0, len(step.input_ids), plan))

    def _run_model(
        self, host: HostStep, step: DeviceStep, *, picked_only: bool = False
    ) -> ModelOutput:
        """Return hidden states of all tokens and logits of the sampling rows. With `picked_only`
        nobody reads the hidden states of others."""
        query_len = self.inputs.query_len(host) if host.num_drafts else 1
        mixed_size = self.inputs.mixed_size(host) if query_len == 1 else 0
        shared = query_len == 1 and self.planner.find_shared(host)
        if self._adapters is not None:
            self._adapters.slots.begin_step(host.token_slots)
        if self._model.runs_tokens_alone:
            adapters = self.adapters
            return run_alone(self._model, self.planner, adapters, host, step, self._metadata)
        size = mixed_size or len(step.seq_lens)
        key = GraphKey(size, shared, host.token_slots is not None, query_len, mixed_size > 0)
        decodes, longest = host.num_decodes, host.max_query_len
        if query_len > 1:  # rows are padded, which the planner of another model may not know
            known = query_len == self.planner.query_len
            decodes, longest = (key.size, 1) if known else (0, query_len)
            query_len = query_len if known else 1
        # 1. Replay a graph, if there is one. It has logits for every token; a mixed one has none.
        num_sampling = len(host.sampling_rows)
        is_uniform = longest == 1 or mixed_size > 0
        if self._graphs is not None and is_uniform and key in self._graphs:
            if self._last_results is not None:  # its copies read what a graph has written
                self._last_results.hold_stream()
                self._last_results = None
            hidden, logits, best = self._graphs.replay(key)
            if mixed_size:
                if num_sampling:
                    logits = self._model.logits(hidden[step.logit_indices])
                return ModelOutput(hidden, logits)
            if num_sampling == len(host.order) and key.query_len == 1:
                best = None if best is None else best.rows(num_sampling)
                return ModelOutput(hidden, logits[:num_sampling], best)
            best = None if best is None else best.at(step.logit_indices)
            return ModelOutput(hidden, logits[step.logit_indices], best)
        # 2. Otherwise run the model, on a mixed step without its padding.
        if mixed_size:
            num_tokens = int(host.query_start_loc[-1])
            step = step.narrow(num_tokens, len(host.order), num_sampling)
        lengths = host.query_start_loc, host.seq_lens
        plan = self.planner.plan(*lengths, decodes, step, shared=shared, query_len=query_len)
        metadata = self._metadata(step, decodes, longest, plan)
        hidden, logits, found = self._model.forward_to_logits(
            *(step.input_ids, step.positions, step.logit_indices[:num_sampling], metadata),
            picked_only=picked_only,
        )
        return ModelOutput(hidden, logits, None if found is None else BestTokens(*found))

    def _forward(self, step: DeviceStep, metadata: AttentionMetadata) -> torch.Tensor:
        """Return hidden states `[T, hidden_size]`; reads no tensors but those in its arguments."""
        return self._model.forward(step.input_ids, step.positions, metadata)

    def _metadata(
        self, step: DeviceStep, num_decodes: int, max_query_len: int, plan: AttentionPlan
    ) -> AttentionMetadata:
        def of_group(group: int, *others: AttentionMetadata) -> AttentionMetadata:
            return AttentionMetadata(
                kv_cache=self._kv_cache,
                slot_mapping=step.slot_mapping[group],
                block_table=step.block_table[group],
                query_start_loc=step.query_start_loc,
                seq_lens=step.seq_lens,
                num_decodes=num_decodes,
                max_query_len=max_query_len,
                plan=plan,
                kv_scales=self._kv_scales,
                states=None if self._states is None else self._states.step,
                others=others,
                places=self._places,
                positions=step.positions,
            )

        return of_group(0, *map(of_group, range(1, self._num_groups)))

    @contextmanager
    def _memory_errors_named(self) -> Iterator[None]:
        """Turn torch's error for a device without memory into a DeviceMemoryError, after which the
        step may be tried again: not among several ranks, whose others wait in a collective."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._ranks.size > 1:
                raise RuntimeError("rank 0 ran out of device memory in a step") from error
            self._backend.release_memory()
            raise DeviceMemoryError("the device ran out of memory in a step") from error

    def copy_blocks(self, copies: abc.Sequence[BlockCopy]) -> None:
        """Copy whole blocks of the cache."""
        if copies:
            self._backend.copy_blocks(self._kv_cache, copies)


class _Computed(NamedTuple):
    """A step whose forward has begun, with logits of the sampling rows."""

    host: HostStep
    step: DeviceStep
    output: ModelOutput
    chunks: list[PromptChunk]


class StepForward:
    """Implements `Forward` of worker_protocol.py for one step, which may have no rows."""

    def __init__(self, runner: ModelRunner, computed: _Computed | None) -> None:
        self._runner = runner
        self._computed = computed

    def sample(self, constraints: SamplingConstraints) -> PendingResults:
        if self._computed is None:
            return PendingResults(0, [], [], [], {})
        return self._runner.sample(self._computed, constraints)
