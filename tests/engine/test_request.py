"""Test requests that a model can never serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quire.engine.errors import InvalidRequestError
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams


def test_a_model_without_head_generates_nothing() -> None:
    engine = SimpleNamespace(
        vocab_size=128,
        max_model_len=64,
        block_size=16,
        num_blocks=4,
        group_windows=(None,),
        step_tokens=64,
        can_generate=False,
    )
    fields: dict[str, Any] = {"request_id": "r", "prompt_token_ids": (1,), "arrival_time": 0.0}
    embedding = Request(**fields, sampling_params=SamplingParams(max_tokens=0), pooling="last")
    embedding.check_fits(engine)
    generation = Request(**fields, sampling_params=SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequestError, match="language-model head"):
        generation.check_fits(engine)
