"""LoRA adapters of tiny models, made and run by PEFT, which is the oracle."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

with warnings.catch_warnings():  # of what PEFT imports
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

Tensors = dict[str, torch.Tensor]


def save_adapter(
    base: PreTrainedModel, folder: Path, *, seed: int = 0, size: float = 0.15, **config: Any
) -> PeftModel:
    """Save a random adapter of `base` in a folder, and return the model with it as PEFT loads it
    from there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    return with_adapter(copy.deepcopy(base), folder)


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the model with the adapter of a folder, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, str(folder)).eval()


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace an adapter's tensors by what `change` makes of them."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def named(tensors: Tensors, pattern: str) -> str:
    """Return the only name that a pattern finds."""
    (name,) = (name for name in tensors if re.search(pattern, name))
    return name
