"""Steps with drafts through the Triton kernels: the decode kernel with several tokens in a row."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.llama import LlamaConfig

from quire.kernels.cuda.attention import decode_schedule

from ...models import COMMON, FAMILIES, build_model, generate
from ...speculation.test_drafted_graphs import DraftedEngine, greedy_requests
from ..cuda_on_cpu import interpreted

MODELS = {
    "llama": lambda: LlamaConfig(**COMMON, head_dim=16),
    "gpt_oss": FAMILIES["gpt_oss"],  # sinks, and windows in some layers
}


@pytest.mark.parametrize("family", MODELS)
def test_drafts_give_the_reference_tokens(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_schedule, "DEFAULT_NUM_SMS", 2)  # programs run one after another
    model = build_model(MODELS[family]())
    model.save_pretrained(tmp_path)
    lengths = [6, 13]
    requests = greedy_requests(lengths)
    expected = {
        request.request_id: generate(model, list(request.prompt_token_ids), length)
        for request, length in zip(requests, lengths, strict=True)
    }
    engine = DraftedEngine(
        tmp_path, expected, 0.8, interpreted(sizes=[1, 2]), num_speculative_tokens=3
    )
    assert engine.tokens(requests) == expected
    assert {key.query_len for key in engine.keys} == {1, 4}
