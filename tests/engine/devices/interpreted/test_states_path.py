"""Compare models whose layers keep a state, on the CUDA path and its Triton kernels, with
transformers: a prompt in chunks beside a decode, then the same prompt from its snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire.kernels.cuda.attention import decode_schedule

from ...models import build_model
from ...state_models import FAMILIES
from ...test_oracle import Engine, Reference
from ...worker_driver import make_prompts
from ..cuda_on_cpu import interpreted


def two_layers(family: str) -> Any:
    """Return the configuration of a small model: a layer with a state, then one with attention
    whose heads the kernels take."""
    config = FAMILIES[family]()
    config.layer_types = ["linear_attention", "full_attention"]
    config.num_hidden_layers = config.num_attention_heads = 2
    config.num_key_value_heads = 1
    return config


@pytest.mark.parametrize("family", ["qwen3_5", "granite_4_h"])
def test_prompts_in_chunks_match_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of 55 tokens takes two steps, the first of them captured, both in chunks."""
    monkeypatch.setattr(decode_schedule, "DEFAULT_NUM_SMS", 2)
    model = build_model(two_layers(family))
    model.save_pretrained(tmp_path)
    reference = Reference(model)
    backend = interpreted(sizes=[1], mixed=[34])
    engine = Engine(tmp_path, backend, max_num_batched_tokens=34, max_num_seqs=2)
    short, long = make_prompts([2, 55])
    for prompts in ([short, long], [long]):
        requests = [engine.add(prompt, 2) for prompt in prompts]
        engine.run()
        for request in requests:
            expected = reference.complete(list(request.prompt_token_ids), 2)
            assert engine.tokens(request) == expected
    assert engine.core.stats().prefix_hits > 0
    assert backend.reruns.num_replays > 1
