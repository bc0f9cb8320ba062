"""An engine without HTTP or a process around it, and its requests, for the engine benchmarks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.models.qwen3 import Qwen3Config

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.request import GrammarSpec, Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams


def small_qwen3(vocab_size: int = 32000, **changes: Any) -> Qwen3Config:
    """Return a Qwen3 shape with 30M parameters at the default vocabulary."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **changes,
    )


def make_core(folder: Path | str, **config: Any) -> EngineCore:
    """Load the model in `folder` into an engine; `config` goes to EngineConfig."""
    engine_config = EngineConfig(model=str(folder), **config)
    return EngineCore(engine_config, Worker(engine_config))


def make_random_core(shape: Qwen3Config, **config: Any) -> EngineCore:
    """Make an engine on the CPU with random weights of this shape and no tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        return make_core(folder, load_format="dummy", device="cpu", **config)


def make_request(
    name: str,
    prompt: Iterable[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    grammar: GrammarSpec | None = None,
    **sampling: Any,
) -> Request:
    """Make a request that does not end before `max_tokens` tokens; `sampling` goes to
    SamplingParams."""
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
            **sampling,
        ),
        arrival_time=time.monotonic(),
        grammar=grammar,
    )
