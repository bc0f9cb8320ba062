"""A pipeline's stages: each holds a range of the layers.

The first stage has the embedding too, the last one the norm. What leaves the last stage goes back
to the first, which has the head: hidden states are much smaller than logits, a tied head needs no
second copy, and rank 0 has the states that it pools and scores, as it has without a pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.metadata import AttentionMetadata
from ..body.body import Body, ForwardToLogits
from ..errors import UnsupportedModelError
from .group import Ring
from .tensor_plan import layers_of


class Given(nn.Module):
    """Stands in for the embedding of a later stage: returns the hidden states it was given."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        """Hidden states have `width` numbers."""
        super().__init__()
        self._width, self._dtype = width, dtype
        self.weight = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)
        """What a model asks for its embedding's device."""
        self.states: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids `[1, T]` → hidden states `[1, T, width]`; without any, numbers for the
        probe."""
        if self.states is not None:
            return self.states[None]
        shape = (*input_ids.shape, self._width)
        count = input_ids.numel() * self._width
        numbers = torch.arange(count, device=input_ids.device, dtype=torch.float32)
        return numbers.mul(0.7).sin().view(shape).to(self._dtype)

    def empty(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Return room for the hidden states of so many tokens."""
        return torch.empty(num_tokens, self._width, dtype=self._dtype, device=device)


def cut_stage(model: Any, body: Any, ring: Ring, architecture: str) -> None:
    """Leave a stage's layers in a transformers model, in place. Raises UnsupportedModelError if
    its body does more than to embed, run its layers and norm."""
    # 1. Keep the layers, which count from 0 in every stage.
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm")):
        raise UnsupportedModelError(f"{architecture}: its layers cannot be told apart for stages")
    layers = layers_of(ring, len(body.layers))
    kept = [body.layers[index] for index in layers]
    for module in (module for layer in kept for module in layer.modules()):
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= layers.start
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[index] for index in layers]
    # 2. Replace what other stages have, and see that nothing else comes before the layers.
    norm, body.norm = body.norm, nn.Identity()
    if ring.stage > 0:
        weight = body.embed_tokens.weight
        body.embed_tokens = Given(weight.shape[1], weight.dtype)
        model.set_output_embeddings(nn.Identity())
        body.layers, text.num_hidden_layers = nn.ModuleList(), 0
        _check_passes(body, architecture)
    body.layers, text.num_hidden_layers = nn.ModuleList(kept), len(kept)
    if ring.stage == ring.size - 1:
        body.norm = norm


@torch.no_grad()
def _check_passes(body: Any, architecture: str) -> None:
    """Raise UnsupportedModelError if a body without layers changes what its embedding returns."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    given = body.embed_tokens(ids)
    positions = torch.arange(3)[None]
    output = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    if not torch.equal(output, given):
        raise UnsupportedModelError(
            f"{architecture}: its body changes hidden states before its first layer, which stages "
            "of a pipeline cannot repeat"
        )


class StageBody:
    """A Body of which this rank runs one stage. The first stage's results are the last one's."""

    is_batch_invariant = False

    def __init__(self, inner: Body, ring: Ring, body: Any) -> None:
        """`inner` runs the layers of `body`, which `cut_stage` has cut."""
        self._inner, self._ring = inner, ring
        embedding = body.embed_tokens
        self._given = embedding if isinstance(embedding, Given) else None

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        ring = self._ring
        if self._given is not None:
            states = self._given.empty(len(input_ids), input_ids.device)
            self._given.states = ring.receive(states)
        hidden = self._inner.forward(input_ids, positions, metadata)
        ring.send(hidden)
        if self._given is None:
            return ring.receive(torch.empty_like(hidden))
        self._given.states = None
        return hidden

    def expect_positions(self, length: int) -> None:
        self._inner.expect_positions(length)

    def fuse_head(self, product: nn.Module) -> ForwardToLogits | None:
        return None
