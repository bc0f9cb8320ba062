"""The probe: three tokens through a model at load, to see that it can be served.

In place of attention, a function records how each layer calls it. A model qualifies if every layer
calls it exactly once, with the metadata that the engine passes down, and with the shapes and
windows that its configuration states. The same forward shows which projections share an input
(body/merged_linear.py), and whether the flattened body computes what the model's own code computes
(flat_proof.py).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface

from ..attention.interface import implementation
from ..attention.layer_traits import traits_of
from ..body.latent_layers import LatentProjection, bind_latents, try_latents
from ..errors import UnsupportedModelError, one_line
from ..layers.latent_heads import LatentHeads
from ..states.layers import allocate_states, quiet
from ..states.state_spec import ATTENTION_TYPES
from ..states.step_states import StepStates
from .model_spec import ModelSpec
from .text_part import NO_INTERFACE, text_body

logger = logging.getLogger("quire.engine")

MAX_KV_ERROR = 1e-3
"""Maximum relative change of the hidden states for a KV cache of fewer bits by default."""
_PROBE = "quire_probe"
"""Name under which transformers knows `_probe_attention`."""
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
"""Arguments that families pass to the attention function without changing its result."""


class LayerCall(NamedTuple):
    """How one layer called the attention function. `obstacle` says why the call cannot be served,
    if it cannot."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    scale: float | None
    softcap: float | None
    has_sinks: bool
    obstacle: str | None


class ProbeResult(NamedTuple):
    """The output of the model's body for the probe's tokens, and the calls of its layers."""

    output: Any
    calls: list[LayerCall]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states `[3, hidden_size]`."""
        states: torch.Tensor = self.output.last_hidden_state
        return states[0]


def check_class(model: Any, spec: ModelSpec) -> None:
    """Raise UnsupportedModelError if the class of a transformers model cannot be served."""
    if spec.state is None and getattr(model, "_is_stateful", False) and _keeps_state(model):
        refuse(spec, "its layers keep a state beside K and V (recurrent or state space)")
    if not type(model)._can_set_attn_implementation():
        refuse(spec, NO_INTERFACE)
    if model.base_model is model or model.base_model_prefix not in model._modules:
        refuse(spec, "its body and its language-model head cannot be told apart")


def prepare_latents(model: Any, spec: ModelSpec, heads: LatentHeads) -> None:
    """Let the layers of a transformers model attend to latents. Raises UnsupportedModelError if
    they are not of a known kind."""
    try:
        bind_latents(text_body(model), heads, spec.num_layers)
    except UnsupportedModelError as error:
        refuse(spec, error.message, error)
    logger.info("%d layers keep latents: %d numbers a token", spec.num_layers, heads.width)


def _keeps_state(model: Any) -> bool:
    """Whether layers keep a state, in a model of a class in which they may.

    They don't if all layers are stated to be of attention, and none has the weights of a state.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if not kinds or not ATTENTION_TYPES.issuperset(kinds):
        return True
    return any(
        name.rpartition(".")[2] == "A_log" or ".conv" in name
        for name, _ in model.named_parameters()
    )


def probe_text(model: Any, spec: ModelSpec) -> tuple[ProbeResult, ProbeResult]:
    """Run the body of a transformers model, and the part of it that text passes through, which may
    be all of it. Raises UnsupportedModelError if that part does not compute the same."""
    whole = run_probe(model, spec, model.base_model)
    body = text_body(model)
    if body is model.base_model:
        return whole, whole
    text = run_probe(model, spec, body)
    if text.calls != whole.calls or not torch.equal(text.hidden, whole.hidden):
        refuse(spec, f"text does not pass through {type(body).__name__} alone")
    return whole, text


def probe_whole(model: Any, spec: ModelSpec, body: Any) -> torch.Tensor | None:
    """Return the probe's hidden states by a body in main memory whose layers are about to be cut;
    None if it does not run there."""
    try:
        with quiet():
            return run_probe(model, spec, body).hidden
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("layers are cut without a comparison: %s", one_line(error))
        return None


def check_parts(spec: ModelSpec, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise UnsupportedModelError if cut layers do not give the hidden states that whole ones do:
    a layer may do more with its numbers than its plan knows, such as norm them all."""
    eps = torch.finfo(expected.dtype).eps  # other kernels than the whole ones' round otherwise
    tolerance = max(1e-3, 8 * eps * spec.num_layers**0.5)
    difference = difference_of(hidden.cpu(), expected)
    if not difference <= tolerance:
        refuse(spec, f"its layers do not give the same in parts (they differ by {difference:.1g})")


def difference_of(hidden: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference of hidden states."""
    return float((hidden - expected).float().norm() / expected.float().norm())


class _Calls(list[LayerCall]):
    """The calls of the layers; K and V are rounded to `kv_dtype` and back, if there is one. It is
    also the layout of the probe's step, for layers that keep a state."""

    kv_dtype: torch.dtype | None = None
    states: StepStates | None = None
    max_query_len = 3

    def begin_states(self, spec: ModelSpec, device: torch.device) -> None:
        """Let the probe's tokens be a sequence that begins, with the only slot of states."""
        if spec.state is not None:
            self.states = allocate_states(spec.state, 1, 3, device)
            self.states.slots.zero_()
            self.query_start_loc = self.states.slots.new_tensor([0, 3])
            self.seq_lens = self.states.slots.new_tensor([3])

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """K and V of each layer."""


@torch.no_grad()
def run_probe(
    model: Any, spec: ModelSpec, body: Any, kv_dtype: torch.dtype | None = None
) -> ProbeResult:
    """Run the body of a transformers model, with K and V rounded to `kv_dtype` if that is given.
    Raises UnsupportedModelError if its attention cannot be served."""
    AttentionInterface.register(_PROBE, _probe_attention)
    calls = _Calls()
    calls.kv_dtype = kv_dtype
    calls.begin_states(spec, model.device)
    text = text_body(model)
    attends = model if text is model.base_model else text
    attends.set_attn_implementation(_PROBE)
    try:
        tokens, positions = probe_input(spec, model.device)
        output = body(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            attn_metadata=calls,
        )
    except UnsupportedModelError as error:
        refuse(spec, error.message)
    finally:
        attends.set_attn_implementation(implementation(has_latents=spec.latents is not None))
    _check_calls(calls, spec)
    _check_sharing(calls, spec)
    if not isinstance(getattr(output, "last_hidden_state", None), torch.Tensor):
        refuse(spec, "its body returns no last_hidden_state")
    return ProbeResult(output, calls)


def bears_rounding(model: Any, spec: ModelSpec, exact: ProbeResult, kv_dtype: torch.dtype) -> bool:
    """Return whether the hidden states change by at most MAX_KV_ERROR of their norm if K and V are
    rounded to `kv_dtype`. `exact` is the probe's result without rounding."""
    hidden = run_probe(model, spec, text_body(model), kv_dtype).hidden
    error = float((hidden - exact.hidden).norm() / exact.hidden.norm())
    kind = str(kv_dtype).removeprefix("torch.")
    if not error <= MAX_KV_ERROR:  # or NaN: a number was beyond the type's range
        logger.info("K and V are not stored in %s, which would change results by %.1g", kind, error)
        return False
    logger.info("K and V are stored in %s, which changes results by %.1g", kind, error)
    return True


def refuse(spec: ModelSpec, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raise UnsupportedModelError with the model's architecture and the reason."""
    raise UnsupportedModelError(f"{spec.architecture}: {reason}") from cause


def probe_input(spec: ModelSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and positions `[3]`. One position is far away, so that a rotation shows."""
    positions = torch.tensor([0, 1, spec.max_position - 1], device=device)
    return torch.arange(3, device=device), positions


def _check_calls(calls: list[LayerCall], spec: ModelSpec) -> None:
    """Raise UnsupportedModelError if the calls are not those of the specification."""
    if sorted(call.layer_idx for call in calls) != list(range(spec.num_layers)):
        refuse(
            spec, f"{len(calls)} attention calls in {spec.num_layers} layers; each must make one"
        )
    for call in calls:
        where = f"layer {call.layer_idx}"
        if call.obstacle is not None:
            refuse(spec, f"{where} {call.obstacle}")
        shape = (call.num_heads, call.num_kv_heads, call.key_dim, call.value_dim)
        kv_heads, head_dim = spec.heads_of(call.layer_idx)
        value_dim = head_dim if spec.latents is None else spec.latents.rank
        expected = (spec.num_attention_heads, kv_heads, head_dim, value_dim)
        if shape != expected:
            refuse(
                spec,
                f"{where} has (heads, KV heads, K dim, V dim) {shape}, "
                f"not {expected} as " + ("stated" if spec.layer_heads else "all layers must"),
            )
        if call.window != spec.windows[call.layer_idx]:
            refuse(
                spec,
                f"{where} attends with window {call.window}, "
                f"its configuration says {spec.windows[call.layer_idx]}",
            )


def _check_sharing(calls: _Calls, spec: ModelSpec) -> None:
    """Raise UnsupportedModelError if a layer that has another's lines in the KV cache attends to
    other K and V."""
    if spec.kv_lines is None:
        return
    first: dict[tuple[int, ...], int] = {}
    for layer, lines in enumerate(spec.kv_lines.of_layer):
        source = first.setdefault(lines, layer)
        if not all(map(torch.equal, calls.shared[layer], calls.shared[source])):
            refuse(spec, f"layer {layer} does not attend to K and V of layer {source}")


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: _Calls | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call, and mix Q, K and V instead of attending. query `[1, heads, T, head_dim]`."""
    if attn_metadata is None:
        raise UnsupportedModelError("keyword arguments do not reach its attention function")
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{type(module).__name__} does not know its layer's index")
    if (traits := traits_of(module)) is not None:
        sliding_window = traits.window
    attn_metadata.append(
        LayerCall(
            layer_idx,
            query.shape[1],
            key.shape[1],
            key.shape[-1],
            value.shape[-1],
            sliding_window,
            scaling,
            softcap,
            s_aux is not None,
            _obstacle(module, attention_mask, others),
        )
    )
    attn_metadata.shared[layer_idx] = key, value
    if isinstance(getattr(module, "kv_b_proj", None), LatentProjection):
        return _probe_latents(module, query, key, scaling, attn_metadata), None
    if query.shape[-1] != value.shape[-1]:  # refused afterwards: all heads must be alike
        return query.new_zeros((*query.shape[:-1], value.shape[-1])).transpose(1, 2), None
    rounding = attn_metadata.kv_dtype
    if rounding is not None:
        key, value = (part.to(rounding).to(part.dtype) for part in (key, value))
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return mix(query, key, value, s_aux)[None], None


def _probe_latents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    calls: _Calls,
) -> torch.Tensor:
    """Attend to the probe's tokens through latents, and note in the last call if they do not make
    the keys and values that transformers' code makes."""
    heads: LatentHeads = module.kv_b_proj.heads  # type: ignore[assignment, union-attr]
    if (query.shape[-1], key.shape[-1]) != (heads.query_dim, heads.width):
        raise UnsupportedModelError(
            f"queries of {query.shape[-1]} numbers attend to latents of {key.shape[-1]}, not of "
            f"{heads.query_dim} to {heads.width} as stated"
        )
    if calls.kv_dtype is not None:
        key = key.to(calls.kv_dtype).to(key.dtype)
    output, difference = try_latents(module, query, key, scale)
    call, obstacle = calls[-1], None
    if call.window is not None or call.softcap is not None or call.has_sinks:
        obstacle = "attends to latents through a window, with a soft cap or with sinks"
    elif not difference <= max(1e-4, 8 * torch.finfo(key.dtype).eps):
        obstacle = f"makes other keys and values of its latents (they differ by {difference:.1g})"
    calls[-1] = call._replace(obstacle=call.obstacle or obstacle)
    return output


def _obstacle(
    module: nn.Module, attention_mask: torch.Tensor | None, others: dict[str, Any]
) -> str | None:
    """Name the thing that a layer asks of its attention and quire's attention does not do, if
    there is one."""
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        return "attends to later tokens"
    if attention_mask is not None:
        return "brings an attention mask or bias of its own"
    unknown = sorted(
        name
        for name, argument in others.items()
        if argument is not None and name not in _HARMLESS_ARGUMENTS
    )
    return f"asks its attention for {', '.join(unknown)}" if unknown else None


def mix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Stand in for attention with a result that depends on all of them. `[T, heads, D]`."""
    group = query.shape[1] // key.shape[1]
    mixed = query + (key + value).repeat_interleave(group, dim=1)
    return mixed if sinks is None else mixed + sinks[:, None].to(mixed.dtype)
