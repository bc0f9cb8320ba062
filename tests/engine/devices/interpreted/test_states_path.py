"""Compare models whose layers keep a state, on the CUDA path and its Triton kernels, with
transformers: prompts in chunks beside decodes, then the same ones from their snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.kernels.cuda.attention import decode_schedule

from ...models import build_model
from ...state_models import FAMILIES
from ...test_oracle import Engine, Reference
from ...worker_driver import make_prompts
from ..cuda_on_cpu import interpreted


@pytest.mark.parametrize("family", ["qwen3_5", "granite_4_h"])
def test_prompts_in_chunks_match_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 75 tokens takes two steps, each of which has the recurrence in chunks."""
    monkeypatch.setattr(decode_schedule, "DEFAULT_NUM_SMS", 2)
    model = build_model(FAMILIES[family]())
    model.save_pretrained(tmp_path)
    reference = Reference(model)
    backend = interpreted(sizes=[2], mixed=[32])
    engine = Engine(tmp_path, backend, max_num_batched_tokens=64, max_num_seqs=4)
    for _ in range(2):
        requests = [engine.add(prompt, 3) for prompt in make_prompts([75, 5, 41])]
        engine.run()
        for request in requests:
            expected = reference.complete(list(request.prompt_token_ids), 3)
            assert engine.tokens(request) == expected
    assert engine.core.stats().prefix_hits > 0
    assert backend.reruns.num_replays > 1
