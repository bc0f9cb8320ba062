"""The protocols that a device implements. One Backend is chosen at load (choose.py); nothing
outside this room asks what device it runs on.

    Backend    is made once: it knows what the device supports, its memory, how it runs a model
    Planner    is made for one KV cache, and plans how each step attends
    Graphs     are captured steps, if the device can capture any
    HostBlocks copies blocks between KV caches and host memory
    Rehearsal  is the model runner as a backend sees it while the worker starts
"""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from ..adapters.slots import Adaptable, AdapterSlots, LoraLimits
from ..attention.metadata import AttentionPlan
from ..body.body import Body
from ..body.flat_decoder import FlatDecoder
from ..body.grouped_linear import GroupedWeight
from ..config import EngineConfig
from ..layers.attention_shape import AttentionShape
from ..layers.latent_heads import LatentHeads
from ..sampling.sampler import Sampler
from ..states.step_states import StateOps
from ..step import BlockCopy, BlockLoad, BlockSave
from .steps import DeviceStep, GraphKey, HostStep, ModelOutput, StepInputs

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Planner(Protocol):
    """Plans how each step over one KV cache attends."""

    @property
    def query_len(self) -> int:
        """The tokens of rows that it can plan as decodes, if all rows are padded to them; 1 if only
        rows with one token are decodes."""

    def find_shared(self, host: HostStep) -> bool:
        """Decide whether this step reads the prefixes that its decodes share once for all of them,
        which takes a plan, or a graph, of another kind.

        Called once a step, since it may send what it finds to the device.
        """

    def plan(
        self,
        query_start_loc: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        num_decodes: int,
        step: DeviceStep,
        *,
        shared: bool = False,
        query_len: int = 1,
    ) -> AttentionPlan:
        """Plan a step. query_start_loc and seq_lens are those of AttentionMetadata, on the host;
        `shared` is the result of `find_shared`, and `query_len` that of `StepInputs.query_len`."""


class Graphs(Protocol):
    """Captured steps: of decodes, whose rows have one token or are padded to the same number, and
    mixed ones, which are padded at their end."""

    def __len__(self) -> int:
        """The number of graphs."""

    def __contains__(self, key: object) -> bool:
        """Whether there is a graph for this GraphKey."""

    def replay(self, key: GraphKey) -> ModelOutput:
        """Run a step of this kind on the static tensors; its output is valid until the next replay.
        A mixed step has no logits, any other one those of every token."""


class Rehearsal(Protocol):
    """A model runner before its first request. Its blank steps write nothing to the KV cache and
    read its first blocks."""

    @property
    def inputs(self) -> StepInputs:
        """The runner's, made by the backend."""

    @property
    def planner(self) -> Planner:
        """The runner's, made by the backend."""

    @property
    def adapters(self) -> AdapterSlots | None:
        """The slots of LoRA adapters, if there are any."""

    @property
    def draft(self) -> Rehearsal | None:
        """The runner of the draft model over the same inputs, if there is one."""

    def run_prompts(self, num_tokens: int, num_seqs: int) -> object:
        """Run a blank step that begins so many sequences, without logits."""

    def run_decodes(
        self, step: DeviceStep, plan: AttentionPlan, logits: torch.Tensor | None = None
    ) -> ModelOutput:
        """Run a step in which every row has one token, or as many as the plan says, with logits for
        each, in `logits` if that is given. It reads no tensors but those of the step, the plan and
        the cache, so that it can be captured."""

    def run_mixed(self, step: DeviceStep, plan: AttentionPlan) -> torch.Tensor:
        """Run a padded mixed step, which can be captured like those of `run_decodes`. Returns its
        hidden states."""

    @property
    def num_parameters(self) -> int:
        """The number of the model's parameters, on all ranks."""

    def run_largest_step(self) -> None:
        """Run the largest blank step that is allowed, and sample all its rows."""

    def sample_blank(self, top_p: float) -> None:
        """Draw a token from logits that are all zero."""

    def copy_blocks(self, copies: abc.Sequence[BlockCopy]) -> None:
        """Copy blocks of the runner's cache."""


class HostBlocks(Protocol):
    """Copies whole blocks between KV caches and slots of host memory.

    A slot holds a block of each cache, one after the other, each as `[layers, 2, heads, block_size,
    width]` without gaps.
    """

    def move(
        self, step: int, saves: abc.Sequence[BlockSave], loads: abc.Sequence[BlockLoad]
    ) -> None:
        """Begin a step's copies: all saves, then all loads. What is launched after this finds the
        blocks saved and loaded; the host may not read or change the slots before they have ended.
        Steps are given in order, those without copies included."""

    def ended(self) -> int:
        """Return the last step whose copies have ended, as those of all before have; never wait."""

    def wait(self) -> None:
        """Wait until all copies have ended."""


class CacheDemand(NamedTuple):
    """The facts on which the size of a KV cache depends, besides the device's memory."""

    config: EngineConfig
    architecture: str
    block_bytes: int
    group_windows: tuple[int | None, ...]
    """The window of each group of layers that has block tables of its own."""
    max_model_len: int
    adapter_bytes: int = 0
    """Bytes that LoRA adapters will take when all slots are filled."""
    state_bytes: int = 0
    """Bytes that the states of running sequences take; they belong to the cache."""


StartRehearsal = abc.Callable[[int], Rehearsal]
"""Makes a model runner with a KV cache of this many blocks."""


class Backend(Protocol):
    """One kind of device."""

    device: torch.device

    # -- what it supports ------------------------------------------------------------------------

    def default_dtype(self, checkpoint: str) -> str:
        """Return the dtype of models if none is asked for; `checkpoint` is that of the weights."""

    def kv_cache_dtype(self, config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
        """Return the KV cache's dtype. Raises ConfigurationError on one that is unsupported.

        If none is asked for ("auto") and this is not the model's, the cache gets it only if the
        model bears the rounding (`probe.bears_rounding`)."""

    def check_quantization(self, config: EngineConfig) -> None:
        """Raise ConfigurationError if the device has no kernels for quantised weights."""

    def rounded(self, weight: torch.Tensor, quantization: str) -> GroupedWeight:
        """Return the weight `[out_features, in_features]` of a linear layer as `make_body` would
        round it; a last group that is not full is filled up with columns of zeros."""

    def check_latents(self, heads: LatentHeads, architecture: str) -> None:
        """Raise UnsupportedModelError if the device has no kernels for layers with these heads,
        which share a latent (`AttentionPlan.attend_latents`)."""

    def check_deterministic(self) -> None:
        """Raise ConfigurationError, with the reason, if a token that is computed by itself may get
        other bits another time."""

    def check_ranks(self, config: EngineConfig) -> None:
        """Prepare for one of several ranks, if there are several. Raises ConfigurationError if this
        host has too few devices for its ranks."""

    @property
    def collectives(self) -> str:
        """The backend of torch.distributed for the device's tensors: "nccl" or "gloo"."""

    @property
    def multiplies_groups(self) -> bool:
        """Whether linear layers may be GroupedLinear; if not, their weights are made dense."""

    @property
    def multiplies_float8(self) -> bool:
        """Whether grouped weights may be of float8; if not, they are made dense."""

    @property
    def keeps_rows(self) -> bool:
        """Whether embeddings and experts may be grouped (`grouped_rows.py`); if not, their weights
        are made dense."""

    def weight_bytes(self, weight: torch.Tensor | GroupedWeight, quantization: str | None) -> int:
        """Return the bytes that a weight `[out_features, in_features]` takes on the device, rounded
        as `quantization` says if it is not grouped."""

    def token_budget(self, config: EngineConfig) -> int:
        """Return the maximum number of tokens in a step."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether launches return before the device has computed, so that the host can prepare the
        next step in the meantime."""

    @property
    def random_devices(self) -> list[int]:
        """Device indices whose random state `torch.random.fork_rng` has to keep."""

    # -- the model -------------------------------------------------------------------------------

    def make_body(
        self,
        body: nn.Module,
        head: nn.Module,
        flat: FlatDecoder | None,
        *,
        quantization: str | None,
        adaptable: bool = False,
    ) -> Body:
        """Choose how the body runs. `flat` is the same body, flattened, if it can be.

        May take over the weights, and replace the linear layers of `body` and `head` in place, by
        quantised ones if there is a `quantization`. Grouped layers keep their integers, or are made
        dense. Who passes `adaptable` calls `make_adapter_slots` next.
        """

    def make_adapter_slots(
        self, body: Body, adaptable: Adaptable, limits: LoraLimits
    ) -> AdapterSlots:
        """Let a body that this backend made run with LoRA adapters; `adaptable` are its linear
        layers, which may be replaced in place."""

    def make_state_ops(self) -> StateOps:
        """Make what runs the layers that keep a state."""

    def make_sampler(self, vocab_size: int) -> Sampler:
        """Make a sampler that draws in the device's own way."""

    # -- the KV cache ----------------------------------------------------------------------------

    def cache_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        """Return the bytes that the KV cache may take. Raises ConfigurationError if a step does
        not fit the device, UnsupportedModelError if its kernels cannot run the model."""

    def allocate_kv_cache(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, commit: bool
    ) -> torch.Tensor:
        """Allocate a zeroed cache, so that a slot never written holds no NaN. `commit` takes its
        memory now even if the system would give it later."""

    def copy_blocks(self, kv_cache: torch.Tensor, copies: abc.Sequence[BlockCopy]) -> None:
        """Copy whole blocks, over all layers, K and V; at least one."""

    def make_host_blocks(
        self, caches: abc.Sequence[torch.Tensor], memory: memoryview
    ) -> HostBlocks:
        """Let blocks of these caches be copied to slots that fill `memory`, and back."""

    # -- steps -----------------------------------------------------------------------------------

    def make_inputs(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        num_groups: int = 1,
    ) -> StepInputs:
        """Make what lays out steps of at most this many rows, tokens, and blocks a row, for so many
        groups of layers with tables of their own."""

    def make_planner(
        self,
        config: EngineConfig,
        kv_cache: torch.Tensor,
        num_heads: int,
        shapes: abc.Set[AttentionShape],
        dtype: torch.dtype,
    ) -> Planner:
        """Make the planner of one KV cache, for layers of `num_heads` that attend in these shapes,
        with queries of `dtype`. If a layer has no window, the first group's tables hold the blocks
        of all tokens."""

    def prepare(self, runner: Rehearsal, config: EngineConfig) -> Graphs | None:
        """Compile or capture what steps will need, so that no request waits for it. Called once,
        with the runner that will serve; returns the graphs of its steps, if any."""

    def release_memory(self) -> None:
        """Give back the memory that torch keeps in reserve, after a step ran out of it."""
