"""CUDA as a backend: Triton kernels, and CUDA graphs of steps.

Importing this loads Triton.
"""

from __future__ import annotations

import logging
from collections import abc
from math import prod

import torch
import triton
from torch import nn
from triton.errors import TritonError

from ....kernels.checks import obstacle_of_latents
from ....kernels.cuda.dependent_launch import OLDEST_CAPABILITY
from ....kernels.cuda.tuning import decode_rows
from ....kernels.device_copy import to_device
from ....kernels.prefix_groups import find_prefix_groups
from ...adapters.slots import Adaptable, AdapterSlots, LoraLimits
from ...body.body import Body, FlatBody, HfBody
from ...body.flat_decoder import FlatDecoder
from ...body.grouped_linear import GroupedWeight
from ...config import EngineConfig
from ...errors import ConfigurationError, UnsupportedModelError, one_line
from ...layers.attention_shape import AttentionShape
from ...layers.latent_heads import LatentHeads
from ...sampling.sampler import Sampler
from ...step import BlockCopy
from ..backend import CacheDemand, Graphs, Rehearsal, StartRehearsal
from ..streamed_blocks import StreamedBlocks
from .attention import CudaPlanner, allocate_workspaces
from .body_ops import CudaOps
from .draws import CudaDraws
from .inputs import DeviceInputs
from .layers.adapters import CudaSlots
from .layers.experts import use_experts
from .layers.kernels import TRITON, Kernels
from .layers.products import use_products
from .layers.states import CudaStateOps
from .memory import free_memory, others_memory, total_memory
from .mixed_graphs import mixed_sizes
from .rehearsing import capture_graphs, compile_kernels, of_cuda
from .requirements import check_gpu
from .shared_prefixes import FindGroups, SharedPrefixes
from .step_graphs import MAX_DRAFT_SIZE, Capture, CudaCapture, graph_sizes

logger = logging.getLogger("quire.engine")

MAX_QUERY_LEN = 8
"""Maximum tokens of a row that the decode kernel takes."""
MAX_QUERY_ROWS = 64
"""Maximum tokens of a row times heads of a group, which are one tile of the decode kernel."""


def require_gpu(*, pdl: bool = False) -> None:
    """Raise ConfigurationError if the first GPU is too old for the kernels, or for programmatic
    dependent launch (`pdl`); warn of a Triton that is known to make wrong code for it."""
    facts = torch.cuda.get_device_properties(0)
    if pdl and 10 * facts.major + facts.minor < OLDEST_CAPABILITY:
        raise ConfigurationError(
            f"--enable-pdl needs compute capability 9.0 or later, and {facts.name} has "
            f"{facts.major}.{facts.minor}"
        )
    warning = check_gpu(facts.name, (facts.major, facts.minor), triton.__version__)
    if warning is not None:
        logger.warning("%s", warning)


class CudaBackend:
    """Implements Backend, which states the contract.

    It also runs on the CPU's tensors: with references in place of the kernels, or with Triton's
    interpreter. The tests' backend does that and replaces what asks `torch.cuda`.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        kernels: Kernels = TRITON,
        find_groups: FindGroups = find_prefix_groups,
    ) -> None:
        """`find_groups` decides which rows read a shared prefix once."""
        self.device = device or torch.device("cuda", 0)
        self._kernels = kernels
        self._find_groups = find_groups

    def default_dtype(self, checkpoint: str) -> str:
        """The checkpoint's, but bfloat16 for float32, whose products no tensor core takes."""
        if checkpoint != "float32":
            return checkpoint
        logger.info("the checkpoint is float32 and is computed in bfloat16; see --dtype")
        return "bfloat16"

    def kv_cache_dtype(self, config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
        asked = config.kv_cache_dtype
        if asked.startswith("fp8"):
            return torch.float8_e4m3fn
        if asked != "auto" and getattr(torch, asked) != model_dtype:
            raise ConfigurationError(
                f"a KV cache of dtype {asked} works only on the CPU: on a GPU it is the model's "
                "dtype, or fp8"
            )
        return model_dtype

    def check_quantization(self, config: EngineConfig) -> None:
        if config.quantization is not None:
            raise ConfigurationError(f"quantization {config.quantization} works only on the CPU")

    def rounded(self, weight: torch.Tensor, quantization: str) -> GroupedWeight:
        raise AssertionError("check_quantization has refused it")

    def check_latents(self, heads: LatentHeads, architecture: str) -> None:
        if obstacle_of_latents(heads.rank, heads.width) is not None:
            raise UnsupportedModelError(
                f"{architecture}: its latents of {heads.rank} numbers and {heads.rope_dim} rotated "
                "ones run on the CPU only: a GPU's kernels take a power of two from 16 to 512, and "
                "a multiple of 8 from 16 to 64"
            )

    def check_deterministic(self) -> None:
        raise ConfigurationError(
            "--deterministic works only on the CPU: on a GPU, products and attention split their "
            "sums by what else is in the step"
        )

    def check_ranks(self, config: EngineConfig) -> None:
        if config.num_ranks == 1:
            return
        found = torch.cuda.device_count()
        if config.ranks_per_node > found:
            raise ConfigurationError(
                f"{config.ranks_per_node} ranks on this host need as many GPUs, but torch sees "
                f"{found} (--tensor-parallel-size, --pipeline-parallel-size)"
            )
        torch.cuda.set_device(self.device)

    @property
    def collectives(self) -> str:
        return "nccl"

    @property
    def multiplies_groups(self) -> bool:
        return True

    @property
    def multiplies_float8(self) -> bool:
        return True

    @property
    def keeps_rows(self) -> bool:
        return False

    def weight_bytes(self, weight: torch.Tensor | GroupedWeight, quantization: str | None) -> int:
        return weight.nbytes if isinstance(weight, torch.Tensor) else weight.num_bytes

    def token_budget(self, config: EngineConfig) -> int:
        """By default thousands, since a GPU needs many tokens at once to be busy."""
        return config.max_num_batched_tokens or 8192

    @property
    def is_asynchronous(self) -> bool:
        return True

    @property
    def random_devices(self) -> list[int]:
        return [self.device.index]

    def make_body(
        self,
        body: nn.Module,
        head: nn.Module,
        flat: FlatDecoder | None,
        *,
        quantization: str | None,
        adaptable: bool = False,
    ) -> Body:
        for module in (body, head):
            use_products(module, self._kernels)
        if number := use_experts(body, self._kernels):
            logger.info("the experts of %d layers run as grouped products", number)
        if flat is not None:
            logger.info("the layers run as one function")
        return HfBody(body) if flat is None else FlatBody(flat, CudaOps.of_step)

    def make_adapter_slots(
        self, body: Body, adaptable: Adaptable, limits: LoraLimits
    ) -> AdapterSlots:
        dtype = next(iter(adaptable.places.values())).linear.weight.dtype
        assert isinstance(dtype, torch.dtype)
        return CudaSlots(body, adaptable, limits, dtype, self.device, self._kernels)

    def make_state_ops(self) -> CudaStateOps:
        return CudaStateOps(self._kernels)

    def make_sampler(self, vocab_size: int) -> Sampler:
        return Sampler(vocab_size, self.device, CudaDraws())

    def cache_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        """Return the bytes left within gpu_memory_utilization once the largest step has its room:
        what torch holds at its peak, what others (context, libraries) hold, and the graphs."""
        config = demand.config
        peak = self._peak_memory(demand, start)  # always, since it compiles every kernel
        if config.kv_cache_memory_bytes:
            return config.kv_cache_memory_bytes
        graphs = self._graph_memory(config, start)
        others = others_memory(self.device)
        allowed = int(total_memory(self.device) * config.gpu_memory_utilization)
        return allowed - peak - others - graphs

    def allocate_kv_cache(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, commit: bool
    ) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        return torch.zeros(size, dtype=torch.uint8, device=self.device).view(dtype).view(shape)

    def copy_blocks(self, kv_cache: torch.Tensor, copies: abc.Sequence[BlockCopy]) -> None:
        sources, destinations = to_device(copies, torch.int64, self.device).T.contiguous()
        self._kernels.copy_blocks(kv_cache, sources, destinations)

    def make_host_blocks(
        self, caches: abc.Sequence[torch.Tensor], memory: memoryview
    ) -> StreamedBlocks:
        return StreamedBlocks(caches, memory, self.device)

    def make_inputs(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        num_groups: int = 1,
    ) -> DeviceInputs:
        sizes = (max_num_seqs, max_num_tokens, max_blocks, block_size)
        return DeviceInputs(*sizes, self.device, self._kernels, num_groups)

    def make_planner(
        self,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        num_heads: int,
        shapes: abc.Set[AttentionShape],
        dtype: torch.dtype,
    ) -> CudaPlanner:
        workspaces = allocate_workspaces(shapes, config.max_num_seqs, dtype, self.device)
        shared_prefixes = None
        if not config.disable_cascade_attn:
            shared_prefixes = SharedPrefixes.allocate(
                workspaces, config.block_size, dtype, kv_cache.dtype, self._find_groups
            )
        draft_workspaces = None
        query_len = min(
            draft_query_len(config),
            *(max_query_len(shape, dtype, self.device) for shape in shapes),
            MAX_QUERY_LEN,
        )
        if query_len > 1:
            draft_workspaces = allocate_workspaces(
                shapes, min(config.max_num_seqs, MAX_DRAFT_SIZE), dtype, self.device, query_len
            )
        return CudaPlanner(self._kernels, workspaces, shared_prefixes, draft_workspaces)

    def prepare(self, runner: Rehearsal, config: EngineConfig) -> Graphs | None:
        """Capture the graphs. Kernels were compiled when memory was measured."""
        sizes, mixed = self.graph_sizes(config), self.mixed_sizes(config, runner)
        if not sizes:
            return None
        return capture_graphs(runner, sizes, mixed, self.make_capture(), self._kernels)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def graph_sizes(self, config: EngineConfig) -> list[int]:
        """Return the batch sizes to capture, ascending."""
        return [] if config.enforce_eager else graph_sizes(config.max_num_seqs)

    def mixed_sizes(self, config: EngineConfig, runner: Rehearsal) -> list[int]:
        """Return the numbers of tokens for which mixed steps are captured, ascending."""
        if config.enforce_eager:
            return []
        inputs, _ = of_cuda(runner)
        parameters = runner.num_parameters // config.tensor_parallel_size
        return mixed_sizes(config.max_cudagraph_capture_size, parameters, inputs.max_num_tokens)

    def make_capture(self) -> Capture:
        """Return what records graphs."""
        return CudaCapture(self.device)

    def _peak_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        """Run the largest step and return the bytes that torch held at its peak. Every kernel that
        a step may launch has been compiled and launched then."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            runner = start(1)
            compile_kernels(runner)
            runner.run_largest_step()
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"a step of {self.token_budget(demand.config)} tokens does not fit the memory of "
                f"{self.device} beside the model: lower --max-num-batched-tokens or --max-num-seqs"
            ) from error
        except (ValueError, TritonError) as error:  # a launcher refuses, or a tile does not fit
            raise UnsupportedModelError(
                f"{demand.architecture}: its kernels do not run on {self.device}: {one_line(error)}"
            ) from error
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _graph_memory(self, config: EngineConfig, start: StartRehearsal) -> int:
        """Estimate the bytes that all graphs take: capture the largest of both kinds, which size
        the shared pool, then one more of a kind, and charge every other graph the difference."""
        sizes = self.graph_sizes(config)
        if not sizes:
            return 0
        first, second = (self._memory_of_graphs(n, 1, config, start) for n in (1, 2))
        others = len(sizes) - 1
        if draft_query_len(config) > 1:
            others += len([size for size in sizes if size <= MAX_DRAFT_SIZE])
        taken = first + others * max(second - first, 0)
        num_mixed = len(self.mixed_sizes(config, start(1)))
        if num_mixed > 1:
            second = self._memory_of_graphs(1, 2, config, start)
            taken += (num_mixed - 1) * max(second - first, 0)
        return taken

    def _memory_of_graphs(
        self, num_sizes: int, num_mixed: int, config: EngineConfig, start: StartRehearsal
    ) -> int:
        """Return the bytes that so many of the largest graphs of both kinds take."""
        runner = start(1)
        before = free_memory(self.device)
        runners = (runner,) if runner.draft is None else (runner, runner.draft)
        graphs = [
            capture_graphs(
                one,
                self.graph_sizes(config)[-num_sizes:],
                self.mixed_sizes(config, one)[-num_mixed:],
                self.make_capture(),
                self._kernels,
            )
            for one in runners
        ]
        taken = before - free_memory(self.device)
        del graphs  # which had to live until here
        return taken


def max_query_len(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> int:
    """Return the maximum tokens of a row that the decode kernel takes from layers of this shape."""
    width, of_latents = shape.value_width or shape.head_dim, shape.value_width is not None
    if decode_rows(width, dtype, device, of_latents=of_latents) is not None:
        return MAX_QUERY_LEN  # the heads of a group are cut to fit a tile
    return MAX_QUERY_ROWS // shape.group


def draft_query_len(config: EngineConfig) -> int:
    """Return to how many tokens the rows of a step with drafts are padded; 1 if there are none."""
    if config.speculation in ("off", "auto") and config.speculative_model is None:
        return 1  # auto: logits depend on how many tokens a step has
    return min(1 + config.num_speculative_tokens, MAX_QUERY_LEN)
