"""The CPU as a backend: products, attention and draws compiled by Numba.

Importing this loads Numba.
"""

from __future__ import annotations

import logging
from collections import abc
from math import prod

import torch
from torch import nn

from ....kernels.device_copy import to_device
from ...adapters.slots import Adaptable, AdapterSlots, LoraLimits
from ...body.body import Body, HfBody
from ...body.flat_decoder import FlatDecoder, Mixture
from ...body.grouped_linear import GroupedWeight
from ...config import EngineConfig
from ...errors import ConfigurationError
from ...layers.attention_shape import AttentionShape
from ...layers.latent_heads import LatentHeads
from ...sampling.sampler import Sampler
from ...step import BlockCopy
from ..backend import CacheDemand, Graphs, Rehearsal, StartRehearsal
from ..host_blocks import DirectBlocks
from .adapters import DecoderSlots, ModuleSlots
from .attention import CpuPlanner
from .decoder import CpuDecoder, can_compile
from .draws import CpuDraws
from .experts import pack_experts
from .inputs import HostInputs
from .memory import allocate_kv_cache, cache_memory
from .packed_embedding import pack_embeddings
from .packed_linear import pack_linears, unmap_weights
from .packing import packed_bytes, rounded
from .states import CpuStateOps

logger = logging.getLogger("quire.engine")


class CpuBackend:
    """Implements Backend, which states the contract."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def default_dtype(self, checkpoint: str) -> str:
        return "float32"

    def kv_cache_dtype(self, config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
        if config.kv_cache_dtype.startswith("fp8"):
            raise ConfigurationError(
                f"a KV cache of dtype {config.kv_cache_dtype} needs a GPU: on the CPU it may be "
                "float32, float16, bfloat16 or int8"
            )
        if config.kv_cache_dtype != "auto":
            asked: torch.dtype = getattr(torch, config.kv_cache_dtype)
            return asked
        # Who asks for float32 gets it throughout.
        is_free = config.dtype == "auto" and model_dtype == torch.float32
        return torch.float16 if is_free else model_dtype

    def check_quantization(self, config: EngineConfig) -> None:
        """Accept every quantisation."""

    def rounded(self, weight: torch.Tensor, quantization: str) -> GroupedWeight:
        found = rounded(weight, quantization)
        assert isinstance(found, GroupedWeight)
        return found

    def check_latents(self, heads: LatentHeads, architecture: str) -> None:
        """Accept every model."""

    def check_deterministic(self) -> None:
        """Accept it: equal products of one row have equal bits."""

    def check_ranks(self, config: EngineConfig) -> None:
        if config.num_ranks > 1:
            logger.warning(
                "%d ranks on the CPU are slower than one process, which runs compiled layers",
                config.num_ranks,
            )

    @property
    def collectives(self) -> str:
        return "gloo"

    @property
    def multiplies_groups(self) -> bool:
        return True

    @property
    def multiplies_float8(self) -> bool:
        return False

    @property
    def keeps_rows(self) -> bool:
        return True

    def weight_bytes(self, weight: torch.Tensor | GroupedWeight, quantization: str | None) -> int:
        return packed_bytes(weight, quantization)

    def token_budget(self, config: EngineConfig) -> int:
        """By default as many as keep a CPU's cores busy: with more, every running sequence would
        wait longer for its next token."""
        return config.max_num_batched_tokens or max(512, 2 * config.max_num_seqs)

    @property
    def is_asynchronous(self) -> bool:
        return False

    @property
    def random_devices(self) -> list[int]:
        return []

    def make_body(
        self,
        body: nn.Module,
        head: nn.Module,
        flat: FlatDecoder | None,
        *,
        quantization: str | None,
        adaptable: bool = False,
    ) -> Body:
        unmap_weights(body)
        unmap_weights(head)
        made: Body
        embeddings = pack_embeddings(body)
        if number := pack_experts(body, quantization=quantization):
            logger.info("the experts of %d layers run in compiled kernels", number)
        mlps = [] if flat is None else [layer.mlp for layer in flat.layers]
        mixtures = [mlp for mlp in mlps if isinstance(mlp, Mixture)]
        # Adapters of layers beside experts would be in a mixture's module, not among the phases.
        has_room = not (mixtures and adaptable)
        if flat is not None and has_room and can_compile(flat):
            for mixture in mixtures:
                pack_linears(mixture.block, quantization=quantization)
            made = CpuDecoder(flat, embeddings.get(flat.embedding), quantization=quantization)
            logger.info("the layers run as one function")
            count = len(mixtures) + 1
            regions = "one parallel region" if count == 1 else f"{count} parallel regions"
            logger.info("each step runs as %s of compiled kernels", regions)
        else:
            pack_linears(body, quantization=quantization)
            made = HfBody(body)
        # The last product decides between tokens, and suffers most from 4 bits.
        pack_linears(
            head,
            quantization="int8" if quantization == "int4" else quantization,
            embeddings=list(embeddings.values()),
        )
        return made

    def make_adapter_slots(
        self, body: Body, adaptable: Adaptable, limits: LoraLimits
    ) -> AdapterSlots:
        if isinstance(body, CpuDecoder):
            return DecoderSlots(body, adaptable, limits)
        return ModuleSlots(adaptable, limits)

    def make_state_ops(self) -> CpuStateOps:
        return CpuStateOps()

    def make_sampler(self, vocab_size: int) -> Sampler:
        return Sampler(vocab_size, self.device, CpuDraws(vocab_size))

    def cache_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        budget = self.token_budget(demand.config)
        return cache_memory(demand, budget)

    def allocate_kv_cache(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, commit: bool
    ) -> torch.Tensor:
        return allocate_kv_cache(shape, prod(shape) * dtype.itemsize, dtype, commit=commit)

    def copy_blocks(self, kv_cache: torch.Tensor, copies: abc.Sequence[BlockCopy]) -> None:
        sources, destinations = to_device(copies, torch.int64, self.device).T
        kv_cache[:, :, destinations] = kv_cache[:, :, sources]

    def make_host_blocks(
        self, caches: abc.Sequence[torch.Tensor], memory: memoryview
    ) -> DirectBlocks:
        return DirectBlocks(caches, memory)

    def make_inputs(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        num_groups: int = 1,
    ) -> HostInputs:
        return HostInputs(max_num_seqs, max_num_tokens, max_blocks, block_size, num_groups)

    def make_planner(
        self,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        num_heads: int,
        shapes: abc.Set[AttentionShape],
        dtype: torch.dtype,
    ) -> CpuPlanner:
        has_full = any(shape.window is None for shape in shapes)
        shares = has_full and not config.disable_cascade_attn
        return CpuPlanner(num_heads, kv_cache, shares=shares)

    def prepare(self, runner: Rehearsal, config: EngineConfig) -> Graphs | None:
        """Run two tokens, and draw from all tokens and from the likeliest: this compiles what this
        machine has not compiled before."""
        runner.run_prompts(2, 1)
        for top_p in (1.0, 0.5):
            runner.sample_blank(top_p)
        return None

    def release_memory(self) -> None:
        """Do nothing: torch keeps no main memory in reserve."""
