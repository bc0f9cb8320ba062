"""A transformers causal language model, split where an engine needs it: body, then head.

The body runs packed tokens to hidden states; the head turns selected hidden states into logits.
The head is the model's own forward with its body replaced by one that passes the hidden states
through, so that whatever a family does to its logits (soft cap, scale) happens here too.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import LinearShape, find_linears
from ..adapters.slots import Adaptable, AdapterSlots, LoraLimits
from ..attention.interface import register_attention
from ..attention.metadata import AttentionMetadata
from ..body.body import Body, BodyOutput, ForwardToLogits
from ..body.merged_linear import merge_siblings
from ..checkpoints.checkpoint import WeightFacts
from ..devices.backend import Backend
from ..errors import UnsupportedModelError, one_line
from ..parallel.adapter_cuts import WHOLE, AdapterCuts
from ..parallel.ranks import ALONE, Ranks
from ..parallel.stages import StageBody
from ..states.model_states import bind_states
from ..states.state_spec import StateSpec
from .classifier import Scores
from .flat_proof import flatten_if_equal
from .model_spec import ModelSpec
from .probe import (
    ProbeResult,
    bears_rounding,
    check_class,
    check_parts,
    probe_text,
    refuse,
    run_probe,
)
from .text_part import text_body

logger = logging.getLogger("quire.engine")


class CausalLM:
    """Runs `forward` over packed tokens, then makes `logits` of the rows that need them."""

    # Over 50 lines: the signature, and three steps that share most of their values.
    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        backend: Backend,
        weights: WeightFacts,
        *,
        can_generate: bool = True,
        quantization: str | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        kv_must_be_borne: bool = False,
        adaptable: bool = False,
        deterministic: bool = False,
        ranks: Ranks = ALONE,
        whole_spec: ModelSpec | None = None,
        expected: torch.Tensor | None = None,
    ) -> None:
        """Take over a transformers model on the backend's device. Raises UnsupportedModelError,
        naming the reason, if it does not pass the probe.

        `can_generate` is False if the head's weights are made up, so that logits mean nothing.
        `quantization` is how linear layers are to be rounded, if they are.
        `kv_cache_dtype` is by default the model's; if the model must bear the rounding and does
        not, it becomes that. `adaptable` prepares for `enable_adapters`. If `deterministic`, logits
        depend on nothing but their own sequence.
        Of several `ranks`, the
        model is this one's part, `spec` describes that part, and `whole_spec` all of it; the probe
        has to give `expected`.
        """
        self.spec = spec
        self.whole_spec = whole_spec or spec
        self.weights = weights
        self._backend = backend
        self.can_generate = can_generate
        self.scores: Scores | None = None
        """Makes the logits of the model's classes, if it has a classifier."""
        self.adapter_cuts: AdapterCuts = WHOLE
        """How the linear layers were cut that adapters add to."""
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.has_ends = ranks.ring is None or ranks.ring.stage == 0
        """Whether this rank has the embedding and the language-model head."""
        self.num_parameters = weights.num_parameters
        # 1. Probe the model, merge projections that share an input, and flatten the body.
        register_attention()
        check_class(model, spec)
        if spec.state is not None:
            self._bind_states(model, spec.state)
        try:
            whole, probed = probe_text(model, spec)
        except RuntimeError as error:
            if ranks.group.size == 1:
                raise
            refuse(spec, f"its layers do not run in parts: {one_line(error)}", error)
        if expected is not None:
            check_parts(spec, probed.hidden, expected)
        self.kv_cache_dtype = kv_cache_dtype or self.dtype
        is_rounded = kv_must_be_borne and self.kv_cache_dtype != self.dtype
        if is_rounded:
            bears = bears_rounding(model, spec, probed, self.kv_cache_dtype)
            if not all(vote for (vote,) in ranks.agree([int(bears)])):
                self.kv_cache_dtype = self.dtype
        body = text_body(model)

        def run() -> ProbeResult:
            return run_probe(model, spec, body)

        merged = Counter(merge_siblings(body, run))
        for names, count in merged.items():
            logger.info("merged %s (%d times)", ", ".join(names), count)
        can_flatten = ranks.ring is None and spec.state is None
        flat = flatten_if_equal(body, spec, probed, run) if can_flatten else None
        self._adaptable: Adaptable | None = None
        if adaptable:
            tokens = len(probed.hidden)
            prefix = next(name for name, module in model.named_modules() if module is body)
            places = find_linears(body, prefix, run, tokens)
            self._adaptable = Adaptable(prefix, places, flat)
        # 2. Split off the head, and let the device choose how the body runs.
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        self._head._modules[model.base_model_prefix] = _Passthrough(
            type(whole.output), model.base_model
        )
        made = backend.make_body(
            body, self._head, flat, quantization=quantization, adaptable=adaptable
        )
        self._body: Body = made if ranks.ring is None else StageBody(made, ranks.ring, body)
        # 3. If logits are nothing but one product, call that, or fuse it with the body.
        self._product = self._check_head(probed.hidden) if self.has_ends else None
        fused = None if self._product is None else self._body.fuse_head(self._product)
        self.forward_to_logits: ForwardToLogits = fused or self._forward_then_logits
        """`forward`'s hidden states, the `logits` of some of the tokens, and perhaps their best
        tokens."""
        invariant = fused is not None and self._body.is_batch_invariant
        self.runs_tokens_alone = deterministic and not invariant
        """Whether `forward` must get one token at a time, since it is to be deterministic."""
        self.is_batch_invariant = invariant or deterministic
        """Whether logits are the same to the bit whatever else is in the step."""

    def _bind_states(self, model: Any, state: StateSpec) -> None:
        """Prepare the layers that keep a state."""
        body, ops = text_body(model), self._backend.make_state_ops()
        try:
            bind_states(body, state, ops, body.config.hidden_size, self.device, self.dtype)
        except UnsupportedModelError as error:
            refuse(self.spec, error.message, error)
        size = state.num_bytes / 1e6
        logger.info("%d layers keep a state: %.1f MB a sequence", state.num_layers, size)

    def enable_adapters(self, limits: LoraLimits) -> AdapterSlots:
        """Let the model run with LoRA adapters. Called once, on a model that was made
        `adaptable`, which it is no longer."""
        assert self._adaptable is not None
        slots = self._backend.make_adapter_slots(self._body, self._adaptable, limits)
        self._adaptable = None
        return slots

    @property
    def linears(self) -> dict[str, LinearShape]:
        """The linear layers that can have adapters, by name, before `enable_adapters`."""
        assert self._adaptable is not None
        return {name: place.shape for name, place in self._adaptable.places.items()}

    @property
    def prefix(self) -> str:
        """The name of the body, with which the names of its layers begin."""
        assert self._adaptable is not None
        return self._adaptable.prefix

    def expect_positions(self, length: int) -> None:
        """Prepare for positions below `length`, which are all that will come."""
        self._body.expect_positions(length)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """input_ids and positions `[T]` int64 → hidden states `[T, hidden_size]`."""
        return self._body.forward(input_ids, positions, metadata)

    def _forward_then_logits(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        picked_only: bool = False,
    ) -> BodyOutput:
        hidden = self._body.forward(input_ids, positions, metadata)
        picked = hidden[logit_indices]
        # No logits at all are not even asked for: other ranks would have to take part.
        logits = self.logits(picked) if len(picked) else picked.new_empty(0)
        return BodyOutput(picked if picked_only else hidden, logits)

    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states `[R, hidden_size]` → logits `[R, vocab_size]` of the model's dtype; in
        `out`, if that is given."""
        product = self._product
        if out is None:
            return self._logits(hidden)
        if type(product) is nn.Linear and product.bias is None and not self.runs_tokens_alone:
            return torch.mm(hidden, product.weight.T, out=out)
        return out.copy_(self._logits(hidden))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.runs_tokens_alone and len(hidden) > 1:
            # Copies, since products may depend on where in memory a row begins.
            rows = [hidden[i : i + 1].clone() for i in range(len(hidden))]
            return torch.cat([self.logits(row) for row in rows])
        if self._product is not None:
            product: torch.Tensor = self._product(hidden)
            return product
        if not self.has_ends:  # the first stage makes them; these have its shape for rehearsals
            return hidden.new_zeros(len(hidden), self.spec.vocab_size)
        return self._whole_head(hidden)

    def _whole_head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]

    @torch.inference_mode()
    def _check_head(self, hidden: torch.Tensor) -> nn.Module | None:
        """Try the head. Returns its linear layer if that gives the same logits by itself."""
        spec = self.spec
        try:
            logits = self._whole_head(hidden)
        except (AttributeError, TypeError) as error:
            refuse(spec, f"its head does not work apart from its body ({error})", error)
        expected = (hidden.shape[0], spec.vocab_size)
        if logits.shape != expected:
            refuse(spec, f"its logits are {tuple(logits.shape)}, not {expected}")
        product = getattr(self._head, "lm_head", None)  # transformers' own name for it
        if isinstance(product, nn.Module) and torch.equal(product(hidden), logits):
            return product
        return None


class _Passthrough(nn.Module):
    """Stands in for a model's body: its input embeddings are the last hidden state. It has the
    body's own numbers, since the head may multiply by one of them."""

    def __init__(self, output_type: type[Any], body: nn.Module) -> None:
        super().__init__()
        self.output_type = output_type
        for name, value in vars(body).items():
            if isinstance(value, int | float) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        return self.output_type(last_hidden_state=inputs_embeds)
