"""Shape and limits of a model, read from its configuration without building the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..attention.layer_traits import CHUNKED
from ..checkpoints.quantized_config import check_method
from ..classifier_spec import NO_CLASSIFIER, ClassifierSpec
from ..config import EngineConfig
from ..embedding_spec import NO_LAYOUT, EmbeddingSpec
from ..errors import (
    ConfigurationError,
    ModelLoadError,
    UnsupportedModelError,
    check_folder,
    one_line,
)
from ..layers.attention_shape import AttentionShape, attention_shapes
from ..layers.kv_lines import KVHeads, KVLines
from ..layers.latent_heads import LatentHeads, read_latents
from ..parallel.tensor_plan import Heads, layers_of
from ..states.state_spec import ATTENTION_TYPES, LAYER_TYPES, STATE_TYPES, StateSpec, read_state
from .classifier_layout import read_classifier
from .embedding_layout import read_embedding
from .end_tokens import read_end_tokens

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..parallel.group import Ring


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and limits of a causal language model.

    `num_layers` counts the layers with K and V, and `kv_layers` are their places among all layers,
    whose types are `layer_types`.
    `state` is what the layers that keep a state keep of a sequence; None if there are none.
    `windows[i]` is how many of the latest tokens layer i attends to, the current one included;
    None means all. `max_position` is the longest context in tokens that the positional encoding
    covers, rope scaling included. `dtype` is the checkpoint's, as a torch name without the prefix.
    `embedding` says how embeddings are made, or why none are, and `classifier` how scores are.
    If layers differ in the heads of K and V, `layer_heads` has those of each, and `kv_lines` says
    how they lie in the cache, whose lines have `num_kv_heads` and `head_dim`.
    If heads share a latent, `latents` says how: the cache then has one KV head of `head_dim`
    numbers, and no V.
    """

    architecture: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str
    embedding: EmbeddingSpec | str = NO_LAYOUT
    classifier: ClassifierSpec | str = NO_CLASSIFIER
    layer_heads: tuple[KVHeads, ...] | None = None
    kv_lines: KVLines | None = None
    latents: LatentHeads | None = None

    @property
    def kv_parts(self) -> int:
        """The parts of the cache: K and V, or 1 if values are in the keys."""
        return 2 if self.latents is None else 1

    @property
    def lines(self) -> KVLines:
        """The lines of the KV cache; if layers are alike, one for each."""
        if self.kv_lines is not None:
            return self.kv_lines
        return KVLines.alike(KVHeads(self.num_kv_heads, self.head_dim), self.windows)

    def heads_of(self, layer: int) -> KVHeads:
        """Return the heads of a layer's K and V."""
        if self.layer_heads is not None:
            return self.layer_heads[layer]
        return KVHeads(self.num_kv_heads, self.head_dim)

    @property
    def attention_shapes(self) -> frozenset[AttentionShape]:
        """The shapes in which layers attend."""
        heads = [self.heads_of(layer) for layer in range(self.num_layers)]
        value_width = None if self.latents is None else self.latents.rank
        return attention_shapes(
            self.lines, self.num_attention_heads, heads, self.windows, value_width
        )

    state: StateSpec | None = None
    kv_layers: tuple[int, ...] = ()
    layer_types: tuple[str, ...] = ()

    def kv_bytes_per_token(self, element_size: int, step_bytes: int = 0) -> int:
        """Return the bytes of one token's K and V over all layers; `element_size` is in bytes. Each
        head's K and V may have `step_bytes` more."""
        size = self.head_dim * element_size + step_bytes
        return self.kv_parts * len(self.lines.windows) * self.num_kv_heads * size

    @property
    def heads(self) -> Heads:
        """The numbers of attention heads."""
        return Heads(self.num_attention_heads, self.num_kv_heads)

    def part(self, size: int, ring: Ring | None) -> ModelSpec:
        """Return the specification of one rank's part of the model, if `size` ranks share each
        layer and `ring` the layers."""
        query, kv = self.heads.of_rank(size)
        layers, own = layers_of(ring, len(self.layer_types)), self.kv_range(ring)
        types = self.layer_types[layers.start : layers.stop]
        state = self.state
        if state is not None:
            state = state.part(sum(kind in STATE_TYPES for kind in types), size)
        return replace(
            self,
            num_attention_heads=query,
            num_kv_heads=kv,
            num_layers=len(own),
            windows=self.windows[own.start : own.stop],
            layer_types=types,
            kv_layers=tuple(self.kv_layers[number] - layers.start for number in own),
            state=state,
        )

    def kv_range(self, ring: Ring | None) -> range:
        """Return which of the layers with K and V a stage has."""
        layers = layers_of(ring, len(self.layer_types))
        before = sum(place < layers.start for place in self.kv_layers)
        return range(before, before + sum(place in layers for place in self.kv_layers))

    def resolve_max_model_len(self, requested: int | None) -> int:
        """Return the context length to serve. Raises ConfigurationError if more is requested than
        the positional encoding covers."""
        if requested is None:
            return self.max_position
        if requested > self.max_position:
            raise ConfigurationError(
                f"max_model_len {requested} is over the {self.max_position} positions that "
                f"{self.architecture} encodes"
            )
        return requested


def read_hf_config(config: EngineConfig, checkpoint: Checkpoint | None = None) -> Any:
    """Read the transformers configuration of `config.model`; `checkpoint` is its checkpoint if
    that has a format of its own.

    Code in the folder (`auto_map`) runs only with `trust_remote_code`. Raises ModelLoadError.
    """
    from transformers import AutoConfig

    if checkpoint is not None:
        return checkpoint.hf_config()
    check_folder(config.model)
    try:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a broken file makes json, hub or validation raise
        if not config.trust_remote_code and "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"{config.model!r} needs code of its own to be executed; --trust-remote-code does"
            ) from error
        raise ModelLoadError(
            f"cannot read the configuration of {config.model!r}: {one_line(error)}"
        ) from error


def spec_from_hf_config(hf_config: Any, config: EngineConfig) -> ModelSpec:
    """Derive the specification from `config.json` and, for the end tokens, other files. Raises
    UnsupportedModelError, or ModelLoadError if one cannot be read; no weight is touched."""
    text = hf_config.get_text_config(decoder=True)
    architecture = (getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0]
    _refuse_unsupported(hf_config, text, architecture)
    try:
        kinds = _layer_types(text, architecture)
        kv_layers = tuple(i for i, kind in enumerate(kinds) if kind in ATTENTION_TYPES)
        if not kv_layers:
            raise UnsupportedModelError(
                f"{architecture}: its layers are of type {', '.join(sorted(set(kinds)))}, and none "
                "attends"
            )
        heads: int = text.num_attention_heads
        windows = _windows(text, [kinds[layer] for layer in kv_layers], architecture)
        latents = read_latents(text)
        if getattr(text, "is_heterogeneous", False):
            shapes = _unequal_heads(text, windows, architecture)
        elif latents is not None:
            shapes = {"num_kv_heads": 1, "head_dim": latents.width, "latents": latents}
        else:
            shapes = {
                "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
                "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            }
        return ModelSpec(
            architecture=architecture,
            num_layers=len(kv_layers),
            num_attention_heads=heads,
            vocab_size=text.vocab_size,
            max_position=_max_position(text),
            windows=windows,
            eos_token_ids=read_end_tokens(hf_config, config, text.vocab_size),
            dtype=str(getattr(hf_config, "dtype", None) or text.dtype or "float32").removeprefix(
                "torch."
            ),
            embedding=read_embedding(hf_config, config),
            classifier=read_classifier(hf_config, config),
            state=_state(text, kinds, architecture),
            kv_layers=kv_layers,
            layer_types=tuple(kinds),
            **shapes,
        )
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{architecture}: its configuration is not a causal language model's ({error})"
        ) from error


def _unequal_heads(text: Any, windows: tuple[int | None, ...], architecture: str) -> dict[str, Any]:
    """Return the fields of the specification for layers that differ in the heads of K and V. Raises
    UnsupportedModelError if they differ in more, or their K and V cannot lie in blocks that are
    alike."""
    others = text.per_layer_attributes - {"head_dim", "num_key_value_heads"}
    if others:
        raise UnsupportedModelError(
            f"{architecture}: its layers differ in {', '.join(sorted(others))}"
        )
    num_layers = len(windows)
    heads = tuple(
        KVHeads(layer.num_key_value_heads, layer.head_dim)
        for layer in map(text.per_layer_config.__getitem__, range(num_layers))
    )
    # The last layers attend to K and V of the last one of their kind before them.
    first_shared = num_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    last = {kind: layer for layer, kind in enumerate(text.layer_types[:first_shared])}
    sources = [
        layer if layer < first_shared else last.get(text.layer_types[layer], layer)
        for layer in range(num_layers)
    ]
    lines = KVLines.of_layers(heads, windows, sources)
    if lines is None:
        raise UnsupportedModelError(
            f"{architecture}: its layers have heads of K and V that do not divide each other: "
            + ", ".join(f"{kind.num_heads} × {kind.head_dim}" for kind in sorted(set(heads)))
        )
    line = lines.heads
    return {
        "num_kv_heads": line.num_heads,
        "head_dim": line.head_dim,
        "layer_heads": heads,
        "kv_lines": lines,
    }


def _refuse_unsupported(hf_config: Any, text: Any, architecture: str) -> None:
    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{architecture}: {reason}")

    if getattr(hf_config, "is_encoder_decoder", False) or getattr(
        text, "add_cross_attention", False
    ):
        refuse("encoder-decoder models and cross attention are not supported")
    if getattr(text, "is_causal", True) is False:
        refuse("its tokens attend to later ones")
    if getattr(text, "index_topk", None) is not None:
        refuse("its indexer chooses which tokens are attended to, which is not supported")
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is not None:
        check_method(quantization)
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES)
    if odd:
        refuse(f"layers of type {', '.join(odd)} are not supported")


def _layer_types(text: Any, architecture: str) -> list[str]:
    """Return the type of each layer. If the configuration names none, all layers attend alike:
    through a window, if it has one."""
    num_layers: int = text.num_hidden_layers
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        return ["sliding_attention"] * num_layers
    if len(layer_types) < num_layers:
        raise UnsupportedModelError(
            f"{architecture}: {len(layer_types)} layer types for {num_layers} layers"
        )
    return list(layer_types[:num_layers])


def _windows(text: Any, kinds: list[str], architecture: str) -> tuple[int | None, ...]:
    """Return the windows of layers with K and V, those in chunks as engine/layers writes them."""
    sliding: int | None = getattr(text, "sliding_window", None)
    window_of = {"sliding_attention": sliding}
    if CHUNKED in kinds:
        chunk = getattr(text, "attention_chunk_size", None)
        if not (isinstance(chunk, int) and chunk > 0):
            raise UnsupportedModelError(
                f"{architecture}: attention_chunk_size is {chunk!r}, but some layers attend in "
                "chunks"
            )
        window_of[CHUNKED] = -chunk
    return tuple(window_of.get(kind) for kind in kinds)


def _state(text: Any, kinds: list[str], architecture: str) -> StateSpec | None:
    try:
        return read_state(text, kinds)
    except AttributeError as error:
        odd = ", ".join(sorted(STATE_TYPES.intersection(kinds)))
        raise UnsupportedModelError(
            f"{architecture}: layers of type {odd} keep a state of a kind that is not supported"
        ) from error


def _max_position(text: Any) -> int:
    """Return max_position_embeddings, stretched by the rope scaling if there is one.

    llama3 and longrope state the stretched length themselves, and so do configurations with one
    rope per layer type (Gemma-3). "dynamic" re-scales as the longest row of a batch grows, which
    would make a row depend on its neighbours: it is served up to its unscaled length.
    """
    positions: int = text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if factor is None:
        return positions
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or positions
        return max(positions, int(original * factor))
    return int(positions * factor) if rope.get("rope_type") == "linear" else positions
