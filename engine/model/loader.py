"""Loads a model from a folder or a hub id onto its device, ready to attend through the cache."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from ..adapters.adapter import linear_shapes
from ..attention.interface import IMPLEMENTATION, register_attention
from ..attention.layer_traits import note_traits
from ..body.chosen_experts import choose_experts
from ..body.grouped_linear import GroupedLinear
from ..body.grouped_rows import GroupedEmbedding
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..classifier_spec import ClassifierSpec
from ..config import EngineConfig
from ..devices.backend import Backend
from ..embedding_spec import EmbeddingSpec
from ..errors import (
    ConfigurationError,
    ModelLoadError,
    QuireError,
    UnsupportedModelError,
    one_line,
)
from ..parallel.adapter_cuts import WHOLE, AdapterCuts
from ..parallel.cut_layers import cut_tensors, round_cut_layers
from ..parallel.ranks import ALONE, Ranks
from ..parallel.stages import cut_stage
from ..parallel.state_cuts import check_states, cut_states, find_styles
from ..parallel.tensor_plan import body_plan, check_parallel, layers_of
from ..states.layers import find_layers
from ..states.model_states import check_config, number_attention
from .assemble import assemble, weight_facts
from .causal_lm import CausalLM
from .classifier import make_scores
from .model_spec import ModelSpec, read_hf_config, spec_from_hf_config
from .probe import check_class, prepare_latents, probe_whole
from .text_part import auto_class, check_attention_error, drop_other_parts, name_body, text_body

logger = logging.getLogger("quire.engine")


def resolve_dtype(config: EngineConfig, spec: ModelSpec, backend: Backend) -> torch.dtype:
    """Return the model's dtype; "auto" leaves it to the device. Raises UnsupportedModelError on a
    name that is not a float type of 16 bits or more."""
    name = backend.default_dtype(spec.dtype) if config.dtype == "auto" else config.dtype
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{spec.architecture}: dtype {name} is not supported, choose one with --dtype"
        )
    return dtype


# Over 50 lines: each step hands on most of its values.
def load_model(config: EngineConfig, backend: Backend, ranks: Ranks = ALONE) -> CausalLM:
    """Load `config.model`, or random weights of its shape with load_format "dummy".

    Only safetensors and GGUF are read, quantised or not: no pickle, and no code in the folder
    unless trust_remote_code. Of several `ranks`, each keeps its part. Raises ModelLoadError if
    files are missing, cut or do not match, UnsupportedModelError if the model cannot work here,
    ConfigurationError if the device cannot.
    """
    checkpoint = open_checkpoint(config)
    hf_config = read_hf_config(config, checkpoint)
    spec = spec_from_hf_config(hf_config, config)
    if spec.state is not None:
        check_config(config, spec.architecture)
    if spec.latents is not None:
        _check_latents(config, spec.architecture)
        backend.check_latents(spec.latents, spec.architecture)
    check_parallel(
        config,
        hf_config,
        spec.architecture,
        spec.heads,
        len(spec.layer_types),
        spec.kv_layers,
        has_unequal_heads=spec.layer_heads is not None,
    )
    if spec.state is not None:
        check_states(config.tensor_parallel_size, spec.state, spec.architecture)
    max_model_len = spec.resolve_max_model_len(config.max_model_len)
    device, dtype = backend.device, resolve_dtype(config, spec, backend)
    kv_cache_dtype = backend.kv_cache_dtype(config, dtype)  # refused before weights are read
    if spec.latents is not None and kv_cache_dtype.itemsize == 1:
        raise ConfigurationError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs layers with K and V, but the cache of "
            f"{spec.architecture} holds latents: choose a type of 16 or 32 bits"
        )
    if spec.layer_heads is not None and kv_cache_dtype.itemsize == 1:
        raise ConfigurationError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs layers whose heads are alike, but "
            f"those of {spec.architecture} differ"
        )
    _check_device(config, backend)
    register_attention()
    try:
        model, can_generate, source_format = _load(
            hf_config, spec, config, dtype, backend, checkpoint
        )
        if spec.latents is not None:
            prepare_latents(model, spec, spec.latents)
        facts = weight_facts(model, source_format, config.quantization, backend.weight_bytes)
        expected, cuts = _cut(model, spec, config, backend, ranks, max_model_len)
        model.to(device)
        for module in model.modules():
            if isinstance(module, GroupedLinear | GroupedEmbedding):
                module.grouped = module.grouped.to(device)
    except QuireError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(f"{config.model!r} does not fit the memory of {device}") from error
    except Exception as error:  # whatever a broken file makes safetensors, json or the hub raise
        check_attention_error(error, spec.architecture)
        raise ModelLoadError(f"cannot load {config.model!r}: {one_line(error)}") from error
    model.eval().requires_grad_(False)
    _fix_rope(model, max_model_len, spec)
    logger.info(
        "%s, computed in %s: %.1f MB of weights",
        facts.source_format,
        facts.computed_format,
        facts.num_bytes / 1e6,
    )
    ranks.meet(backend)
    loaded = CausalLM(
        model,
        spec.part(ranks.group.size, ranks.ring),
        backend,
        facts,
        can_generate=can_generate,
        quantization=config.quantization,
        kv_cache_dtype=kv_cache_dtype,
        kv_must_be_borne=config.kv_cache_dtype == "auto",
        adaptable=config.enable_lora,
        deterministic=config.deterministic,
        ranks=ranks,
        whole_spec=spec,
        expected=expected,
    )
    loaded.adapter_cuts = cuts
    if isinstance(spec.classifier, ClassifierSpec):
        loaded.scores = make_scores(spec.classifier, config, loaded.logits)
    return loaded


def _check_latents(config: EngineConfig, architecture: str) -> None:
    """Raise ConfigurationError if the configuration asks for something that does not work with
    layers whose heads share a latent."""
    reasons = {
        "--tensor-parallel-size": (config.tensor_parallel_size > 1, "run on one device"),
        "--pipeline-parallel-size": (config.pipeline_parallel_size > 1, "run on one device"),
        "--enable-lora": (config.enable_lora, "have no adapters"),
    }
    for flag, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ConfigurationError(
                f"{architecture}: layers whose heads share a latent {reason}: leave {flag} out"
            )


def _check_device(config: EngineConfig, backend: Backend) -> None:
    """Raise ConfigurationError if the device cannot do what is asked for."""
    backend.check_quantization(config)
    if config.deterministic:
        backend.check_deterministic()


def _load(
    hf_config: Any,
    spec: ModelSpec,
    config: EngineConfig,
    dtype: torch.dtype,
    backend: Backend,
    checkpoint: Checkpoint | None,
) -> tuple[Any, bool, str]:
    """Return the model, without parts that text does not pass through; whether its head was in the
    weights; and the checkpoint's format. Weights that were read are in main memory."""
    has_head = True
    if config.load_format == "dummy":
        model, source_format = _build_dummy(hf_config, config, dtype, backend), "random weights"
    elif checkpoint is not None and checkpoint.load_arguments is None:
        build = partial(_build, hf_config, config, dtype)
        model = assemble(
            checkpoint,
            build,
            dtype,
            keep_groups=backend.multiplies_groups,
            keep_float8=backend.multiplies_float8,
            keep_rows=backend.keeps_rows,
        )
        source_format = checkpoint.source_format
    else:
        model, has_head = _load_weights(hf_config, spec, config, dtype, checkpoint)
        if checkpoint is not None:
            checkpoint.finish(model)
        source_format = (
            f"safetensors {spec.dtype}" if checkpoint is None else checkpoint.source_format
        )
    drop_other_parts(model)
    note_traits(text_body(model), model.config.get_text_config(decoder=True))
    choose_experts(text_body(model))
    return model, has_head, source_format


def _cut(
    model: Any,
    spec: ModelSpec,
    config: EngineConfig,
    backend: Backend,
    ranks: Ranks,
    max_model_len: int,
) -> tuple[torch.Tensor | None, AdapterCuts]:
    """Leave this rank's part of the model, in place, whose layers with K and V count from 0 then.
    Returns what the probe gives with whole layers, on the one rank of those that share them that
    has to compare it, and how the layers were cut."""
    group, body = ranks.group, text_body(model)
    expected, cuts = None, WHOLE
    if ranks.size > 1:
        model.eval().requires_grad_(False)
        check_class(model, spec)
        prefix = next(name for name, module in model.named_modules() if module is body)
        cuts = AdapterCuts({}, linear_shapes(body, prefix), prefix)
    if ranks.ring is not None:
        cuts = cuts._replace(stage=layers_of(ranks.ring, len(body.layers)))
        cut_stage(model, body, ranks.ring, spec.architecture)
    layers = {}
    if spec.state is not None:
        number_attention(body, spec.part(1, ranks.ring).kv_layers)
        layers = find_layers(body)
    if group.size > 1:
        if config.quantization is not None:
            kind, plan = config.quantization, body_plan(model.config)
            rounded = partial(backend.rounded, quantization=kind)
            styles = find_styles(layers)
            round_cut_layers(body, plan, group.size, spec.architecture, rounded, styles)
        if group.rank == 0:
            _fix_rope(model, max_model_len, spec)
            expected = probe_whole(model, spec.part(1, ranks.ring), body)
        found = cut_tensors(model, body, spec.heads, group, spec.architecture)
        found |= cut_states(layers, group, spec.architecture)
        cuts = cuts._replace(cuts={f"{cuts.prefix}.{name}": cut for name, cut in found.items()})
    return expected, cuts


def _load_weights(
    hf_config: Any,
    spec: ModelSpec,
    config: EngineConfig,
    dtype: torch.dtype,
    checkpoint: Checkpoint | None,
) -> tuple[Any, bool]:
    """Return the model on the CPU, and whether its head was in the weights; only a model that
    makes embeddings can do without. transformers builds on the meta device and shows a progress
    bar."""
    from transformers import GenerationConfig

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": config.model,
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if checkpoint is not None and checkpoint.load_arguments is not None:
        place = checkpoint.load_arguments
    model, report = auto_class(hf_config, config).from_pretrained(
        **place,
        config=hf_config,
        # The model's own file is not needed, and a value that transformers refuses must not matter.
        generation_config=GenerationConfig(),
        dtype=dtype,
        attn_implementation=IMPLEMENTATION,
        output_loading_info=True,
    )
    name_body(model)
    has_head = True
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in report.get(kind) or ())
        if kind == "missing_keys" and _may_lack_head(spec):
            body = f"{model.base_model_prefix}."
            has_head = all(name.startswith(body) for name in names)
            names = [name for name in names if name.startswith(body)]
        if names:
            raise ModelLoadError(
                f"cannot load {config.model!r}: {len(names)} {kind.replace('_', ' ')}, "
                f"the first {names[0]}"
            )
    return model, has_head


def _may_lack_head(spec: ModelSpec) -> bool:
    """Whether the model serves something that needs no language-model head."""
    classifier = spec.classifier
    has_classes = isinstance(classifier, ClassifierSpec) and not classifier.token_ids
    return has_classes or isinstance(spec.embedding, EmbeddingSpec)


def _build_dummy(hf_config: Any, config: EngineConfig, dtype: torch.dtype, backend: Backend) -> Any:
    """Build a model of the real shape with the family's own random initialisation, on the
    device, or in main memory if the device gets only a part of it."""
    place = backend.device if config.num_ranks == 1 else torch.device("cpu")
    with torch.random.fork_rng(devices=backend.random_devices), place:
        torch.manual_seed(config.seed or 0)
        return _build(hf_config, config, dtype)


def _build(hf_config: Any, config: EngineConfig, dtype: torch.dtype) -> Any:
    model = auto_class(hf_config, config).from_config(
        hf_config,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=IMPLEMENTATION,
    )
    name_body(model)
    return model


def _fix_rope(model: Any, max_model_len: int, spec: ModelSpec) -> None:
    """Make rotary frequencies independent of the batch.

    transformers switches longrope between its short and long factors by the longest position in
    a forward, so that a row would change with its neighbours. Here the served context decides
    once: up to the original length the factors are the same, and beyond it the long ones hold for
    short sequences too. "dynamic" never leaves its unscaled range, since the spec ends there.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
        if not kinds & {"longrope", "dynamic"}:
            continue
        if not isinstance(rope_type, str):
            raise UnsupportedModelError(
                f"{spec.architecture}: {', '.join(sorted(map(str, kinds)))} rope per layer type"
            )
        if rope_type == "longrope":
            frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](
                module.config, module.inv_freq.device, seq_len=max_model_len
            )
            module.inv_freq.copy_(frequencies)
        module.rope_type = "default"  # only read by the update in forward
