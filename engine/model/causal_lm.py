"""A transformers causal language model, split where an engine needs it: body, then head.

The body runs packed tokens to hidden states; the head turns selected hidden states into logits.
The head is the model's own forward with its body replaced by one that hands the hidden states
through, so that whatever a family does to its logits (soft cap, scale) happens here too.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from ..attention.interface import IMPLEMENTATION, AttentionMetadata, register_attention
from ..body.flat_decoder import FlatDecoder, FlatLayer, TorchOps, flatten
from ..body.merged_linear import merge_siblings
from ..errors import UnsupportedModelError, one_line
from .model_spec import ModelSpec

if TYPE_CHECKING:
    from ..devices.cpu.decoder import CpuDecoder

logger = logging.getLogger("quire.engine")

_PROBE = "quire_probe"
_HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""What families pass along to the attention function without it changing the result."""


class LayerCall(NamedTuple):
    """How one layer called the attention function; plain is without soft cap and sinks."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    scale: float | None
    is_plain: bool
    obstacle: str | None


class _Passthrough(nn.Module):
    """Stands in for a model's body: its input embeddings are the last hidden state."""

    def __init__(self, output_type: type[Any]) -> None:
        super().__init__()
        self.output_type = output_type

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        return self.output_type(last_hidden_state=inputs_embeds)


class CausalLM:
    """`forward` packed tokens, then `logits` of the rows that need them.

    Built only from models that pass the probe: a tiny forward in which every layer must call the
    attention function once, with metadata, with the shapes and windows of the spec. Raises
    UnsupportedModelError naming the reason.
    """

    def __init__(
        self, model: Any, spec: ModelSpec, *, can_generate: bool = True, int8: bool = False
    ) -> None:
        """`can_generate` is False where the head's weights are made up: logits mean nothing.
        `int8` weights, of linear layers, are for the CPU alone."""
        self.spec = spec
        self.can_generate = can_generate
        register_attention()
        AttentionInterface.register(_PROBE, _probe_attention)
        self._check_class(model)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._body = model.base_model
        body_output, calls = self._probe(model)
        merged = Counter(merge_siblings(self._body, lambda: self._probe(model)))
        for names, count in merged.items():
            logger.info("%d times merged: %s", count, ", ".join(names))
        hidden = body_output.last_hidden_state[0]
        self._flat = self._flatten(hidden, calls)
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        self._head._modules[model.base_model_prefix] = _Passthrough(type(body_output))
        self._compiled: CpuDecoder | None = None
        self._product: nn.Module | None = None
        if self.device.type == "cpu":
            self._prepare_cpu(int8)
        self._check_head(hidden)

    def _prepare_cpu(self, int8: bool) -> None:
        """Weights in the layouts that are fastest; a flat body is compiled or not used."""
        from ..devices.cpu.decoder import CpuDecoder, can_compile
        from ..devices.cpu.packed_linear import leave_files, pack_linears

        leave_files(self._body)
        leave_files(self._head)
        if self._flat is not None and can_compile(self._flat):
            self._compiled = CpuDecoder(self._flat, int8=int8)
            self._body = None
            logger.info("the body is compiled")
        else:
            pack_linears(self._body, int8=int8)
        self._flat = None
        pack_linears(self._head, int8=int8)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """input_ids and positions `[T]` int64 → hidden states `[T, hidden_size]`."""
        if self._compiled is not None:
            return self._compiled(input_ids, positions, input_ids[:0], metadata)[0]
        if self._flat is not None:
            from ..devices.cuda.attention import CudaOps

            return self._flat(input_ids, positions, CudaOps(metadata))
        output = self._body(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            attn_metadata=metadata,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0]

    def forward_to_logits(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the `logits` of the tokens at logit_indices `[R]`."""
        if self._compiled is not None and self._compiled.has_head:
            return self._compiled(input_ids, positions, logit_indices, metadata)
        hidden = self.forward(input_ids, positions, metadata)
        return hidden, self.logits(hidden[logit_indices])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[R, hidden_size]` → logits `[R, vocab_size]` of the model's dtype."""
        if self._product is not None:
            product: torch.Tensor = self._product(hidden)
            return product
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(f"{self.spec.architecture}: {reason}")

    def _check_class(self, model: Any) -> None:
        if getattr(model, "_is_stateful", False):
            self._refuse("its layers keep a state beside K and V (recurrent or state space)")
        if not type(model)._can_set_attn_implementation():
            self._refuse("its attention does not go through transformers' AttentionInterface")
        if model.base_model is model or model.base_model_prefix not in model._modules:
            self._refuse("its body and its language-model head cannot be told apart")

    @torch.no_grad()
    def _probe(self, model: Any) -> tuple[Any, list[LayerCall]]:
        """Run three tokens and check every attention call; the body's output, and the calls."""
        calls: list[LayerCall] = []
        model.set_attn_implementation(_PROBE)
        try:
            tokens, positions = self._probe_input()
            output = self._body(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                attn_metadata=calls,
            )
        except UnsupportedModelError as error:
            self._refuse(error.message)
        finally:
            model.set_attn_implementation(IMPLEMENTATION)
        self._check_calls(calls)
        if not isinstance(getattr(output, "last_hidden_state", None), torch.Tensor):
            self._refuse("its body returns no last_hidden_state")
        return output, calls

    def _probe_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions `[3]`, one of them far, where a rotation would show."""
        positions = torch.tensor([0, 1, self.spec.max_position - 1], device=self.device)
        return torch.arange(3, device=self.device), positions

    @torch.no_grad()
    def _flatten(self, expected: torch.Tensor, calls: list[LayerCall]) -> FlatDecoder | None:
        """The body as one function, if that calls attention as the model does and gives the
        hidden states that the model gave for the probe."""
        flat = flatten(self._body, self.spec.head_dim, self.spec.windows)
        if flat is None:
            return None
        flat_calls = []

        def attend(
            layer: FlatLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.head_dim)
            call = LayerCall(layer.layer_idx, *shape, layer.window, layer.scale, True, None)
            flat_calls.append(call)
            return _mix(query, key, value)

        try:
            hidden = flat(*self._probe_input(), TorchOps(attend))
        except (RuntimeError, TypeError) as error:  # shapes or a rotary embedding of its own kind
            logger.info("the body is not flattened: %s", one_line(error))
            return None
        # Roundings add up as a random walk does: 1.7% over 32 layers of bfloat16, 5% over 80.
        tolerance = max(1e-4, 2 * torch.finfo(self.dtype).eps * len(flat.layers) ** 0.5)
        difference = (hidden - expected).float().norm() / expected.float().norm()
        if flat_calls != calls or not difference <= tolerance:
            logger.info("the body is not flattened: it differs by %.1g", difference)
            return None
        logger.info("the body is flattened")
        return flat

    @torch.inference_mode()
    def _check_head(self, hidden: torch.Tensor) -> None:
        try:
            logits = self.logits(hidden)
        except (AttributeError, TypeError) as error:
            raise UnsupportedModelError(
                f"{self.spec.architecture}: its head does not work apart from its body ({error})"
            ) from error
        expected = (hidden.shape[0], self.spec.vocab_size)
        if logits.shape != expected:
            self._refuse(f"its logits are {tuple(logits.shape)}, not {expected}")
        product = getattr(self._head, "lm_head", None)  # transformers' own name for it
        if isinstance(product, nn.Module) and torch.equal(product(hidden), logits):
            self._product = product
            self._join_head(product)

    def _join_head(self, product: nn.Module) -> None:
        if self._compiled is None:
            return
        from ..devices.cpu.packed_linear import PackedLinear

        if isinstance(product, PackedLinear):
            self._compiled.append_head(product)

    def _check_calls(self, calls: list[LayerCall]) -> None:
        spec = self.spec
        if sorted(call.layer_idx for call in calls) != list(range(spec.num_layers)):
            self._refuse(
                f"{len(calls)} attention calls in {spec.num_layers} layers; each must make one"
            )
        for call in calls:
            where = f"layer {call.layer_idx}"
            if call.obstacle is not None:
                self._refuse(f"{where} {call.obstacle}")
            shape = (call.num_heads, call.num_kv_heads, call.key_dim, call.value_dim)
            expected = (spec.num_attention_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim)
            if shape != expected:
                self._refuse(
                    f"{where} has (heads, KV heads, K dim, V dim) {shape}, "
                    f"not {expected} as all layers must"
                )
            if call.window != spec.windows[call.layer_idx]:
                self._refuse(
                    f"{where} attends with window {call.window}, "
                    f"its configuration says {spec.windows[call.layer_idx]}"
                )


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: list[LayerCall] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call and mix instead of attending. query `[1, heads, T, head_dim]`."""
    if attn_metadata is None:
        raise UnsupportedModelError("keyword arguments do not reach its attention function")
    unknown = sorted(
        name
        for name, argument in others.items()
        if argument is not None and name not in _HARMLESS_ARGUMENTS
    )
    obstacle = None
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        obstacle = "attends to later tokens"
    elif attention_mask is not None:
        obstacle = "brings an attention mask or bias of its own"
    elif unknown:
        obstacle = f"asks its attention for {', '.join(unknown)}"
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{type(module).__name__} does not know its layer's index")
    attn_metadata.append(
        LayerCall(
            layer_idx,
            query.shape[1],
            key.shape[1],
            key.shape[-1],
            value.shape[-1],
            sliding_window,
            scaling,
            softcap is None and s_aux is None,
            obstacle,
        )
    )
    if query.shape[-1] != value.shape[-1]:  # is refused, as all heads must be alike
        return query.new_zeros((*query.shape[:-1], value.shape[-1])).transpose(1, 2), None
    heads = (part[0].transpose(0, 1) for part in (query, key, value))
    return _mix(*heads)[None], None


def _mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In place of attention, so that what a layer gives depends on all three. `[T, heads, D]`."""
    group = query.shape[1] // key.shape[1]
    return query + (key + value).repeat_interleave(group, dim=1)
