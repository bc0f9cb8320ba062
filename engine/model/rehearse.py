"""The loader's checks of a model's class and attention, without its weights: the model is built on
torch's meta device, where tensors have shapes and no numbers.
"""

from __future__ import annotations

import logging

import torch

from ..attention.interface import IMPLEMENTATION, register_attention
from ..checkpoints.checkpoint import open_checkpoint
from ..config import EngineConfig
from ..errors import QuireError, UnsupportedModelError, one_line
from ..states.model_states import number_attention
from .model_spec import read_hf_config, spec_from_hf_config
from .probe import check_class, prepare_latents, run_probe
from .text_part import auto_class, check_attention_error, drop_other_parts, text_body

logger = logging.getLogger("quire.engine")


def rehearse_load(config: EngineConfig) -> None:
    """Raise the error with which the configured model would be refused when it is loaded, if its
    configuration, its class or the calls of its attention show that."""
    checkpoint = open_checkpoint(config)
    hf_config = read_hf_config(config, checkpoint)
    spec = spec_from_hf_config(hf_config, config)
    register_attention()
    # 1. Build the model. Grouped products of experts know bfloat16 on the meta device.
    try:
        with torch.device("meta"):
            model = auto_class(hf_config, config).from_config(
                hf_config,
                dtype=torch.bfloat16,
                trust_remote_code=config.trust_remote_code,
                attn_implementation=IMPLEMENTATION,
            )
    except QuireError:
        raise
    except Exception as error:  # whatever odd configurations make a model's code raise
        check_attention_error(error, spec.architecture)
        raise UnsupportedModelError(f"{spec.architecture}: {one_line(error)}") from error
    drop_other_parts(model)
    # 2. Look at its class, and at the calls of its attention as far as they need no numbers.
    check_class(model.eval(), spec)
    if spec.state is not None:
        number_attention(text_body(model), spec.kv_layers)
    if spec.latents is not None:
        prepare_latents(model, spec, spec.latents)
    try:
        run_probe(model, spec, text_body(model))
    except (NotImplementedError, RuntimeError) as error:
        logger.info("%s runs only with numbers: %s", spec.architecture, one_line(error))
