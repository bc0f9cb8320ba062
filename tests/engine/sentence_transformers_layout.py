"""Write the files that sentence-transformers adds to a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


def add_layout(folder: Path, mode: str, *, normalize: bool = True, newest: bool = False) -> None:
    """Add the layout with a pooling `mode` of theirs; `newest` writes it as release 5.4 does."""
    package = "sentence_transformers.models"
    if newest:
        package = "sentence_transformers.sentence_transformer.modules.any"
    names = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" * (i > 0), "type": f"{package}.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    settings: dict[str, Any] = {"embedding_dimension": 32, "pooling_mode": mode}
    if not newest:
        settings = {f"pooling_mode_{flag}": name == mode for name, flag in FLAGS.items()}
        settings["word_embedding_dimension"] = 32
    edit_json(folder / "1_Pooling/config.json", **settings, include_prompt=True)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=64, do_lower_case=False)
    edit_json(folder / "config_sentence_transformers.json", prompts={}, default_prompt_name=None)


def edit_json(path: Path, **fields: Any) -> None:
    """Set `fields` of a JSON file, which is created if it does not exist."""
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **fields}))
