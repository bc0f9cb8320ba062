"""The device's side of the engine: one model, one KV cache, one step at a time."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.adapter import Adapter, LoraWeight
from ..checkpoints.content_hash import model_hash
from ..checkpoints.source import source_of
from ..config import EngineConfig, WorkerInfo
from ..devices.backend import Backend, CacheDemand
from ..devices.choose import choose_backend
from ..devices.host_blocks import copy_seconds
from ..errors import ConfigurationError
from ..layers.layer_groups import LayerGroups
from ..lora import AdapterSource
from ..main_memory import cpu_quota
from ..model.causal_lm import CausalLM
from ..model.kv_scales import read_kv_scales
from ..model.loader import load_model
from ..parallel.cut_layers import cut_scales
from ..parallel.ranks import ALONE, Ranks, check_alike
from ..parallel.step_plan import StepPlan
from ..step import SchedulerOutput
from .adapter_store import AdapterStore
from .draft_model import load_draft
from .kv_cache import (
    allocate_kv_cache,
    block_bytes,
    check_tables,
    choose_groups,
    memory_beside_states,
    num_blocks_from_memory,
    seats_beside_blocks,
    token_bytes,
)
from .model_runner import ModelRunner, StepForward
from .speculative_runner import SpeculativeRunner

logger = logging.getLogger("quire.engine")


class Worker:
    """Implements WorkerProtocol, which states the contract."""

    def __init__(
        self, config: EngineConfig, backend: Backend | None = None, ranks: Ranks | None = None
    ) -> None:
        """`backend` is by default that of the configured device, chosen by `load`. Without `ranks`
        this is rank 0, and starts the others if the configuration asks for any."""
        if config.pipeline_parallel_size > 1:  # what passes between stages is not captured
            config = replace(config, enforce_eager=True)
        self._config = config
        self._given_backend = backend
        self._ranks: Ranks = ranks or ALONE
        self._starts_ranks = ranks is None and config.num_ranks > 1

    def load(self) -> WorkerInfo:
        if self._starts_ranks:
            from ..parallel.leader import Leader  # loads torch.distributed's store, ZeroMQ

            self._ranks = Leader(self._config)
        try:
            return self._load()
        except BaseException:
            self._ranks.close()
            raise

    def _load(self) -> WorkerInfo:
        # Over 50 lines: half of them are the fields of the result.
        config = self._config
        num_threads = config.num_threads or default_num_threads() or torch.get_num_threads()
        usable = usable_cpus()
        if config.num_threads is not None and config.num_threads > usable:
            raise ConfigurationError(
                f"--num-threads is {config.num_threads}, but this process may use only {usable} "
                f"CPU{'s' if usable > 1 else ''}"
            )
        if config.num_threads is None:  # the ranks of a host share its CPUs
            num_threads = max(1, num_threads // config.ranks_per_node)
        torch.set_num_threads(min(num_threads, usable))  # OMP_NUM_THREADS may be higher
        place = self._ranks.rank % config.ranks_per_node
        self._backend: Backend = self._given_backend or choose_backend(config, place)
        self._backend.check_ranks(config)
        self._model: CausalLM = load_model(config, self._backend, self._ranks)
        model, spec = self._model, self._model.spec
        self._cache_dtype = model.kv_cache_dtype
        self._kv_scales: torch.Tensor | None = None
        has_scales = config.load_format != "dummy" and source_of(config).gguf is None
        if self._cache_dtype == torch.float8_e4m3fn and has_scales:
            scales = read_kv_scales(config.model, model.whole_spec)
            if scales is not None:
                self._kv_scales = cut_scales(scales, self._ranks).to(model.device)
        self._adapters: AdapterStore | None = None
        if config.enable_lora:
            max_tokens = max(self._backend.token_budget(config), config.max_num_seqs)
            self._adapters = AdapterStore(config, model, max_tokens, self._ranks)
        self._max_model_len = spec.resolve_max_model_len(config.max_model_len)
        model.expect_positions(self._max_model_len)
        self._groups = choose_groups(config, spec, self._max_model_len)
        self._draft: CausalLM | None = None
        if config.speculative_model is not None:
            self._draft = load_draft(config, spec, self._max_model_len, self._backend)
            self._draft.expect_positions(self._max_model_len)
        draft = self._draft
        cache_dtype = str(self._cache_dtype).removeprefix("torch.")
        self._info = WorkerInfo(
            architecture=spec.architecture,
            device=_device_name(model.device, config.num_ranks),
            dtype=str(model.dtype).removeprefix("torch."),
            num_parameters=model.num_parameters,
            vocab_size=spec.vocab_size,
            max_model_len=self._max_model_len,
            kv_bytes_per_token=token_bytes(model.whole_spec, self._cache_dtype),
            group_windows=self._groups.windows,
            group_layers=self._groups.count_layers(spec.lines.of_layer),
            max_num_batched_tokens=self._backend.token_budget(config),
            is_asynchronous=self._backend.is_asynchronous,
            eos_token_ids=spec.eos_token_ids,
            embedding=spec.embedding,
            classifier=spec.classifier,
            can_generate=model.can_generate,
            source_format=model.weights.source_format,
            computed_format=model.weights.computed_format,
            weight_bytes=model.weights.num_bytes,
            is_batch_invariant=model.is_batch_invariant,
            draft_weight_bytes=0 if draft is None else draft.weights.num_bytes,
            draft_kv_bytes_per_token=(
                0 if draft is None else token_bytes(draft.spec, draft.kv_cache_dtype)
            ),
            content=model_hash(config),
            kv_cache_dtype=None if self._cache_dtype == model.dtype else cache_dtype,
            adapters=() if self._adapters is None else tuple(self._adapters.sources),
            max_lora_rank=None if self._adapters is None else self._adapters.max_rank,
            state_bytes=0 if spec.state is None else spec.state.num_bytes,
        )
        return self._info

    def profile(self) -> int:
        try:
            return self._profile()
        except BaseException:
            self._ranks.close()
            raise

    def _profile(self) -> int:
        config, spec, max_model_len = self._config, self._model.spec, self._max_model_len
        groups = self._groups
        check_tables(config, groups, max_model_len)
        size = block_bytes(spec, groups, config.block_size, self._cache_dtype)
        if (draft := self._draft) is not None:  # every block has a part in its cache, too
            own = LayerGroups.one_table(len(draft.spec.lines.windows))
            size += block_bytes(draft.spec, own, config.block_size, draft.kv_cache_dtype)
        self._block_bytes = size
        adapters = 0 if self._adapters is None else self._adapters.slots.num_bytes
        states = self._info.state_bytes * config.max_num_seqs
        demand = CacheDemand(
            config, spec.architecture, size, groups.windows, max_model_len, adapters, states
        )
        memory = self._backend.cache_memory(demand, self._make_runner)
        ahead = config.runs_ahead(self._backend.is_asynchronous)
        step_tokens = self._info.max_num_batched_tokens * (1 + ahead)
        if states:
            seats = seats_beside_blocks(memory, config, self._info, size, step_tokens)
            if seats < config.max_num_seqs:
                logger.warning(
                    "--max-num-seqs is lowered to %d: the states of %d sequences, %.1f MB each, "
                    "would leave too little of %.2f GiB for the KV cache",
                    *(seats, config.max_num_seqs, self._info.state_bytes / 1e6, memory / 2**30),
                )
                config = self._config = replace(config, max_num_seqs=seats)
            memory = memory_beside_states(memory, config, self._info)
        num_blocks = num_blocks_from_memory(
            memory, config, groups, size, max_model_len, step_tokens
        )
        num_blocks = min(number for (number,) in self._ranks.agree([num_blocks]))
        num_slots = config.max_num_seqs + self._info.state_snapshots(config, num_blocks)
        self._runner = self._make_runner(num_blocks, num_slots)
        self._runner.prepare()
        check_alike(self._ranks, "which steps are captured", [self._runner.num_graphs])
        if self._adapters is not None:
            self._adapters.send_first()
        return num_blocks

    def forward(self, scheduler_output: SchedulerOutput) -> StepForward:
        return self._runner.forward(scheduler_output)

    def propose(self, scheduler_output: SchedulerOutput) -> dict[int, list[int]]:
        assert isinstance(self._runner, SpeculativeRunner)
        return self._runner.propose(scheduler_output)

    def attach_host_memory(self, memory: memoryview) -> float:
        runner, draft = self._runner, self._runner.draft
        caches = [runner.kv_cache] if draft is None else [runner.kv_cache, draft.kv_cache]
        runner.host_blocks = self._backend.make_host_blocks(caches, memory)
        return copy_seconds(runner.host_blocks)

    def max_num_seqs(self) -> int:
        return self._config.max_num_seqs

    def block_bytes(self) -> int:
        return self._block_bytes

    def copies_ended(self) -> int:
        assert self._runner.host_blocks is not None
        return self._runner.host_blocks.ended()

    def follow(self, plan: StepPlan) -> None:
        """Run a step that rank 0 has planned. Called on all other ranks, in place of `forward`."""
        self._runner.follow(plan)

    def read_adapter(self, source: AdapterSource) -> Adapter:
        assert self._adapters is not None
        return self._adapters.read(source)

    def hold_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        assert self._adapters is not None
        self._adapters.hold(adapter_id, adapter)

    def hold_layer(self, adapter_id: int, name: str, weight: LoraWeight) -> None:
        """Keep a layer of an adapter that rank 0 has read. Called on all other ranks, in place of
        `read_adapter` and `hold_adapter`."""
        assert self._adapters is not None
        self._adapters.hold_layer(adapter_id, name, weight)

    def drop_adapter(self, adapter_id: int) -> None:
        assert self._adapters is not None
        self._adapters.drop(adapter_id)

    def _make_runner(self, num_blocks: int, num_state_slots: int = 1) -> ModelRunner:
        arguments = (
            self._model,
            self._backend,
            self._config,
            self._make_cache(self._model, self._groups, num_blocks),
            self._max_model_len,
            self._kv_scales,
            self._adapters,
        )
        if self._draft is None:
            return ModelRunner(
                *arguments,
                ranks=self._ranks,
                groups=self._groups,
                num_state_slots=num_state_slots,
            )
        one_table = LayerGroups.one_table(len(self._draft.spec.lines.windows))
        return SpeculativeRunner(
            *arguments,
            draft_model=self._draft,
            draft_cache=self._make_cache(self._draft, one_table, num_blocks),
        )

    def _make_cache(self, model: CausalLM, groups: LayerGroups, num_blocks: int) -> torch.Tensor:
        config = self._config
        return allocate_kv_cache(
            self._backend,
            model.spec,
            groups,
            num_blocks,
            config.block_size,
            model.kv_cache_dtype,
            commit=config.kv_cache_memory_bytes is not None,
        )


def _device_name(device: torch.device, num_ranks: int) -> str:
    """Return the device, or how many of its kind all ranks have."""
    return str(device) if num_ranks == 1 else f"{num_ranks} × {str(device).partition(':')[0]}"


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on: no kernel gets more threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_threads() -> int | None:
    """Return one thread for each physical core that this process may use; None leaves it to
    OMP_NUM_THREADS. Two threads on one core only share its vector units and its bandwidth."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    quota = cpu_quota()
    return len(cores) if quota is None else min(len(cores), max(1, int(quota)))
