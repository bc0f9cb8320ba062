"""The text part of a model that also reads images or sound.

Such a checkpoint has a language model inside, with its own configuration, and encoders around it.
Text alone passes through the language model only, which may then be probed, flattened and compiled
as any other; the encoders are dropped.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..attention.interface import IMPLEMENTATION
from ..config import EngineConfig
from ..errors import UnsupportedModelError

logger = logging.getLogger("quire.engine")

NO_INTERFACE = "its attention does not go through transformers' AttentionInterface"
"""Why models of older families are refused."""


def auto_class(hf_config: Any, config: EngineConfig) -> Any:
    """Return the class of transformers that loads a configuration's model: that of causal language
    models, or else that of models of images and text.

    Raises UnsupportedModelError if there is neither, or if the model's attention cannot be
    replaced.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.trust_remote_code and hasattr(hf_config, "auto_map"):
        return AutoModelForCausalLM
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(hf_config) in auto._model_mapping:
            model_class = auto._model_mapping[type(hf_config)]
            if not model_class._can_set_attn_implementation():
                raise UnsupportedModelError(f"{model_class.__name__}: {NO_INTERFACE}")
            return auto
    raise UnsupportedModelError(
        f"{type(hf_config).__name__} has no causal language model in this transformers"
    )


def check_attention_error(error: Exception, architecture: str) -> None:
    """Raise UnsupportedModelError if `error`, from building a model, is that the model looks its
    attention up in a table of its own, which has not quire's."""
    if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):
        raise UnsupportedModelError(f"{architecture}: {NO_INTERFACE}") from error


def name_body(model: Any) -> None:
    """Let transformers find the body of a model: Llama 4's class says where it is in the model of
    images and text."""
    if model.base_model is model and isinstance(getattr(model, "model", None), nn.Module):
        model.base_model_prefix = "model"


def text_body(model: Any) -> Any:
    """Return the layers that text passes through: the body of a transformers model, or the language
    model in it if the model has other parts."""
    if model.config.get_text_config(decoder=True) is model.config:
        return model.base_model
    decoder = model.get_decoder()
    return model.base_model if decoder is None else decoder


def drop_other_parts(model: Any) -> None:
    """Remove what a model's body has beside the modules that text passes through, such as the
    encoder of images, so that it takes no memory."""
    body, text = model.base_model, text_body(model)
    children: list[tuple[str, nn.Module]] = list(body.named_children())
    if text is body or all(child is not text for _, child in children):
        return
    for name, child in children:
        if child is not text:
            number = sum(parameter.numel() for parameter in child.parameters())
            delattr(body, name)
            logger.info("%s is not used for text: %.1fM parameters dropped", name, number / 1e6)
    for name, _ in list(body.named_parameters(recurse=False)):
        delattr(body, name)
