"""What the attention of a layer does that its module does not ask for by arguments.

Llama 4 alone has such layers. Those of type chunked_attention differ from full ones only by the
mask that its model would build. The others scale their queries by their positions (attention
temperature tuning, after arXiv 2501.19399), and count those from the first token of a batch, which
holds for a single sequence only:

    query · (1 + scale · log(1 + floor((position + 1) / floor_scale)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # `quire models` reads configurations without torch
    import torch
    from torch import nn

CHUNKED = "chunked_attention"
"""transformers' name of layers that attend from the last multiple of a number of tokens on."""
_ATTRIBUTE = "quire_traits"


class Temperature(NamedTuple):
    """How queries grow with their positions."""

    scale: float
    floor_scale: float

    def apply(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scale query `[1, heads, T, head_dim]` by its positions `[T]`."""
        steps = ((positions.float() + 1.0) / self.floor_scale).floor()
        factors = steps.log1p() * self.scale + 1.0
        return (query * factors[:, None]).to(query.dtype)


class LayerTraits(NamedTuple):
    """The window of a layer (-c for chunks of c tokens, see engine/layers), and how its queries
    are scaled."""

    window: int | None
    temperature: Temperature | None


def note_traits(body: Any, text_config: Any) -> None:
    """Note the traits of a transformers model's layers in their modules, which leave the scaling of
    queries to `paged_attention` from then on. Called once, while all layers are there."""
    kinds = getattr(text_config, "layer_types", None) or ()
    for module in body.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer >= len(kinds):
            continue
        window = -text_config.attention_chunk_size if kinds[layer] == CHUNKED else None
        temperature = None
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            temperature = Temperature(float(module.attn_scale), float(module.floor_scale))
            setattr(module, "attn_temperature_tuning", False)  # noqa: B010  (no type says so)
        if window is not None or temperature is not None:
            setattr(module, _ATTRIBUTE, LayerTraits(window, temperature))


def traits_of(module: nn.Module) -> LayerTraits | None:
    """Return the traits of a layer, if it has any."""
    traits: LayerTraits | None = vars(module).get(_ATTRIBUTE)
    return traits
