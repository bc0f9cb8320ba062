"""Read from a model's folder how it makes embeddings, in the layout of sentence-transformers.

modules.json                          Transformer → Pooling (→ Normalize), each with its folder
1_Pooling/config.json                 how hidden states become one vector
sentence_bert_config.json             do_lower_case
config_sentence_transformers.json     the prompt that precedes every text
config.json                           matryoshka_dimensions or is_matryoshka
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoints.source import source_of
from ..config import EngineConfig
from ..embedding_spec import NO_LAYOUT, EmbeddingSpec
from ..errors import ModelLoadError
from ..request import Pooling

_POOLINGS: dict[str, Pooling] = {
    "lasttoken": "last",
    "mean": "mean",
    "weightedmean": "weightedmean",
    "max": "max",
}
"""The supported poolings, from sentence-transformers' names to ours."""
_MODE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""All releases but the newest write one flag per pooling mode instead of a name."""


class _RefusedError(Exception):
    """The model makes no embeddings; the message says why."""


def read_embedding(hf_config: Any, config: EngineConfig) -> EmbeddingSpec | str:
    """Return how the model makes embeddings, or the reason why it makes none.

    `config.pooling` takes precedence over the model's files. Raises ModelLoadError if a file of
    the layout cannot be read.
    """
    size: int = hf_config.get_text_config(decoder=True).hidden_size
    dimensions = getattr(hf_config, "matryoshka_dimensions", None) or ()
    is_matryoshka = bool(dimensions or getattr(hf_config, "is_matryoshka", False))
    pooling: Pooling
    try:
        if config.pooling != "auto":
            pooling, normalize, prompt = config.pooling, True, ""
        elif source_of(config).repository is None:
            raise _RefusedError(NO_LAYOUT)
        elif hasattr(hf_config, "auto_map") and not config.trust_remote_code:
            raise _RefusedError("its folder has code of its own, which is not executed")
        else:
            pooling, normalize = _read_modules(config.model)
            prompt = _read_prompt(config.model)
        return EmbeddingSpec(
            pooling=pooling,
            normalize=normalize,
            size=size,
            prompt=prompt,
            is_matryoshka=is_matryoshka,
            matryoshka_dimensions=tuple(dimensions),
        )
    except _RefusedError as error:
        return str(error)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelLoadError(
            f"cannot read the sentence-transformers layout of {config.model!r}: {error}"
        ) from error


def _read_modules(model: str) -> tuple[Pooling, bool]:
    """Return the pooling, and whether a Normalize module follows it."""
    modules = read_json(model, "modules.json")
    if modules is None:
        raise _RefusedError(NO_LAYOUT)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _RefusedError(f"its modules are {', '.join(kinds)}")
    if any(not module["type"].startswith("sentence_transformers.") for module in modules):
        raise _RefusedError("its modules.json names code of its own")
    if modules[0]["path"]:
        raise _RefusedError("its weights are in a folder of their own")
    if (read_json(model, "sentence_bert_config.json") or {}).get("do_lower_case"):
        raise _RefusedError("it lower-cases its input")
    settings = read_json(model, f"{modules[1]['path']}/config.json")
    if settings is None:
        raise _RefusedError(f"{modules[1]['path']}/config.json is missing")
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _MODE_FLAGS.items() if settings.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise _RefusedError(f"pooling by {' and '.join(modes)} is not supported")
    if not settings.get("include_prompt", True) and _read_prompt(model):
        raise _RefusedError("its prompt is left out of the pooling")
    return _POOLINGS[modes[0]], len(modules) == 3


def _read_prompt(model: str) -> str:
    """Return the prompt that precedes every text, "" if there is none."""
    settings = read_json(model, "config_sentence_transformers.json") or {}
    name = settings.get("default_prompt_name")
    return "" if name is None else str(settings["prompts"][name])


def read_json(model: str, name: str) -> Any:
    """Parse a file of the model's folder or hub repository; return None if it does not exist."""
    from transformers.utils import cached_file

    try:
        path = cached_file(model, name)
    except OSError:
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
