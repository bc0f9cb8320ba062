"""How each layer is cut, by transformers' plan of tensor parallelism, which is read as data.

A plan names modules and parameters of a model's body, and how each is cut:

    colwise               a linear layer's output rows; k_proj and v_proj by whole KV heads
    rowwise               a linear layer's input columns; its outputs are summed over the ranks
    colwise_gather_output the language-model head: rows of the vocabulary
    packed_colwise        the same of a layer that has two of them, one after the other
    moe_tp_experts        each expert's intermediate size; its parameters are packed_colwise, or
                          colwise if there is no gate, and rowwise
    embedding_rowwise     not cut: a row of the embedding is read faster than it is summed
    replicated_…          not cut

Everything else is refused by its name. For families of which transformers cuts only a part, there
are plans of our own. Layers that keep a state have rules of their own: see state_cuts.py.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import EngineConfig
from ..errors import ConfigurationError, UnsupportedModelError

if TYPE_CHECKING:
    from collections import abc

    from torch import nn

    from .group import Ring

COLWISE, ROWWISE, EXPERTS = "colwise", "rowwise", "moe_tp_experts"
PACKED = "packed_colwise"
_WHOLE = frozenset({"embedding_rowwise", "replicated_with_grad_allreduce"})
_OF_EXPERTS = frozenset({PACKED, COLWISE, ROWWISE})


def _pairs(parent: str, inputs: abc.Iterable[str], output: str) -> dict[str, str]:
    """Return the plan of layers that read the input, and of one that makes the output."""
    plan = {f"layers.*.{parent}.{name}": COLWISE for name in inputs}
    return plan | {f"layers.*.{parent}.{output}": ROWWISE}


_QKV = ("q_proj", "k_proj", "v_proj")
_LFM2 = _pairs("self_attn", _QKV, "out_proj") | _pairs("feed_forward", ("w1", "w3"), "w2")
_ATTENTION = tuple(f".self_attn.{name}" for name in (*_QKV, "o_proj"))
_OF_NORMED = {"colwise_gather_output": COLWISE, "rowwise_split_input": ROWWISE}
"""What takes the place of two styles by which plans leave an attention whole: one that norms all of
Q and all of K. Here ranks share these norms (SharedNorm)."""
_MAMBA = _pairs("self_attn", _QKV, "o_proj") | _pairs(
    "feed_forward", ("gate_proj", "up_proj"), "down_proj"
)
_OWN_PLANS = {
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "nemotron_h": _pairs("mixer", _QKV, "o_proj")
    | _pairs("mixer", ("up_proj",), "down_proj")
    | _pairs("mixer.shared_experts", ("up_proj",), "down_proj"),
    "granitemoehybrid": _pairs("self_attn", _QKV, "o_proj")
    | {
        "layers.*.shared_mlp.input_linear": PACKED,
        "layers.*.shared_mlp.output_linear": ROWWISE,
    },
}
"""What is added to transformers' plans, by the type of model."""


class Heads(NamedTuple):
    """The attention heads of a model's layers, or of a rank's part of them."""

    query: int
    kv: int

    def of_rank(self, size: int) -> Heads:
        """Return a rank's numbers. If there are more ranks than KV heads, several ranks have the
        same one."""
        return Heads(self.query // size, max(1, self.kv // size))


def check_parallel(
    config: EngineConfig,
    hf_config: Any,
    architecture: str,
    heads: Heads,
    layers: int,
    kv_layers: abc.Sequence[int],
    *,
    has_unequal_heads: bool = False,
) -> None:
    """Raise ConfigurationError or UnsupportedModelError if several ranks cannot run the model, as
    far as its configuration shows that; no weight is touched. `kv_layers` are the places of those
    with K and V among its `layers`, and `has_unequal_heads` says that these differ in the heads of
    K and V."""
    if config.num_ranks == 1:
        return
    if has_unequal_heads:
        tensors = config.tensor_parallel_size > 1
        flag = "--tensor-parallel-size" if tensors else "--pipeline-parallel-size"
        raise UnsupportedModelError(
            f"{architecture}: layers whose heads differ run on one device: leave {flag} out"
        )
    if config.pipeline_parallel_size > layers:
        raise ConfigurationError(
            f"--pipeline-parallel-size is {config.pipeline_parallel_size}, but {architecture} has "
            f"only {layers} layers"
        )
    if not _all_attend(config.pipeline_parallel_size, layers, kv_layers):
        fits = [size for size in range(1, layers + 1) if _all_attend(size, layers, kv_layers)]
        raise ConfigurationError(
            f"--pipeline-parallel-size {config.pipeline_parallel_size} leaves a stage of "
            f"{architecture} without a layer that attends: choose from "
            f"{', '.join(map(str, fits))}"
        )
    size = config.tensor_parallel_size
    if size > 1:
        _check_heads(size, heads, architecture)
        _check_styles(body_plan(hf_config), architecture)


def _all_attend(stages: int, layers: int, kv_layers: abc.Sequence[int]) -> bool:
    """Return whether each of so many stages has a layer with K and V."""
    shares = (_share(stage, stages, layers) for stage in range(stages))
    return all(any(place in share for place in kv_layers) for share in shares)


def _check_heads(size: int, heads: Heads, architecture: str) -> None:
    query, kv = heads

    def fits(number: int) -> bool:
        return query % number == 0 and (kv % number == 0 or number % kv == 0)

    if not fits(size):
        sizes = ", ".join(str(number) for number in range(1, query + 1) if fits(number))
        raise ConfigurationError(
            f"--tensor-parallel-size {size} does not divide the {query} heads and {kv} KV "
            f"heads of {architecture}: choose from {sizes}"
        )


def _check_styles(plan: dict[str, str], architecture: str) -> None:
    if not plan:
        raise UnsupportedModelError(
            f"{architecture}: transformers has no plan of tensor parallelism for it"
        )
    of_experts = {name for name, style in plan.items() if style == EXPERTS}
    for name, style in plan.items():
        inner = name.rpartition(".")[0] in of_experts
        known = _OF_EXPERTS if inner else _WHOLE | {COLWISE, ROWWISE, EXPERTS, PACKED}
        if style not in known:
            raise UnsupportedModelError(
                f"{architecture}: its tensor-parallel plan cuts {name} by {style!r}, which is not "
                "supported"
            )


def body_plan(hf_config: Any) -> dict[str, str]:
    """Return the plan of a model's text body, by patterns of names in it, without layers that keep
    a state; empty if there is none."""
    text = hf_config.get_text_config(decoder=True)
    plan = dict(getattr(text, "base_model_tp_plan", None) or {})
    plan = {
        name: _OF_NORMED.get(style, style) if name.endswith(_ATTENTION) else style
        for name, style in plan.items()
        if ".linear_attn." not in name
    }
    return plan | _OWN_PLANS.get(text.model_type, {})


def find_cuts(body: nn.Module, plan: dict[str, str], architecture: str) -> dict[str, str]:
    """Return the style of each module of the body that is cut, by its name.

    Raises UnsupportedModelError if a layer would not be cut in pairs of colwise and rowwise, which
    is what makes its output whole again.
    """
    patterns = {
        re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")): style
        for pattern, style in plan.items()
        if style not in _WHOLE
    }
    cuts = {
        name: style
        for name, _ in body.named_modules()
        for pattern, style in patterns.items()
        if pattern.fullmatch(name)
    }
    for parent, styles in _by_parent(cuts).items():
        if styles.keys() == {EXPERTS}:
            continue
        if not (styles[COLWISE] + styles[PACKED] and styles[ROWWISE]):
            raise UnsupportedModelError(
                f"{architecture}: its tensor-parallel plan cuts only one side of {parent}"
            )
        if "attn" in parent or "attention" in parent:
            _check_attention(parent, cuts, architecture)
        if list(body.get_submodule(parent).parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{architecture}: {parent} has parameters of its own, which no plan cuts"
            )
    if not cuts:
        raise UnsupportedModelError(f"{architecture}: its tensor-parallel plan cuts no layer")
    return cuts


def _check_attention(parent: str, cuts: dict[str, str], architecture: str) -> None:
    """Raise UnsupportedModelError if Q, K and V are not three layers: the rows of one for all would
    have to be cut in three places."""
    children = {
        name.rpartition(".")[2]
        for name, style in cuts.items()
        if style == COLWISE and name.rpartition(".")[0] == parent
    }
    if children != {"q_proj", "k_proj", "v_proj"}:
        raise UnsupportedModelError(
            f"{architecture}: {parent} is cut in {', '.join(sorted(children))}, not in q_proj, "
            "k_proj and v_proj"
        )


def _by_parent(cuts: dict[str, str]) -> dict[str, Counter[str]]:
    parents: dict[str, Counter[str]] = {}
    for name, style in cuts.items():
        parent = name.rpartition(".")[0]
        parents.setdefault(parent, Counter())[style] += 1
    return parents


def layers_of(ring: Ring | None, num_layers: int) -> range:
    """Return a stage's layers; of uneven shares the first stage has the smaller."""
    if ring is None:
        return range(num_layers)
    return _share(ring.stage, ring.size, num_layers)


def _share(stage: int, size: int, num_layers: int) -> range:
    return range(stage * num_layers // size, (stage + 1) * num_layers // size)
