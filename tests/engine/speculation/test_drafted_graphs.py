"""Steps with drafts on the CUDA path: rows padded to the same number of tokens, and replayed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from quire.engine.core.engine_core import EngineCore
from quire.engine.devices.steps import GraphKey, ModelOutput
from quire.engine.lora import AdapterSource
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Sequence

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..lora_models import save_adapter
from ..models import generate, save_model
from ..worker_driver import make_config
from .drafters import RandomDrafter, always
from .test_exactness import _content, _run

SIZES = [1, 2, 4, 8]
OPTIONS = {"num_blocks": 80, "max_num_batched_tokens": 64, "max_model_len": 128}


def _prompts() -> list[list[int]]:
    chance = random.Random(3)
    return [[chance.randrange(3, 128) for _ in range(length)] for length in (1, 9, 16, 31, 40)]


def greedy_requests(lengths: list[int]) -> list[Request]:
    """Return requests for so many tokens each, of prompts of 1 to 40 tokens."""
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt),
            sampling_params=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
            arrival_time=0.0,
        )
        for index, (prompt, length) in enumerate(zip(_prompts(), lengths, strict=False))
    ]


class DraftedEngine:
    """An engine with graphs, whose drafts are right with a chance of `right`. `keys` are those of
    the graphs that it replays."""

    def __init__(
        self,
        folder: Path,
        answers: dict[str, list[int]],
        right: float,
        backend: CudaOnCpuBackend | None = None,
        **fields: Any,
    ) -> None:
        config = make_config(folder, **OPTIONS | {"speculation": "ngram"} | fields)
        self.worker = Worker(config, backend or CudaOnCpuBackend(sizes=SIZES))
        self.core = EngineCore(config, self.worker)

        def answer(sequence: Sequence) -> list[int]:
            return answers[sequence.request.request_id]

        drafting = self.core._scheduler._drafting
        assert drafting is not None
        drafting.speculator = always(RandomDrafter(answer, right, 5, 128), max_draft=9)
        self.keys: list[GraphKey] = []
        graphs = self.worker._runner._graphs
        assert graphs is not None
        self._replay, graphs.replay = graphs.replay, self._record  # type: ignore[method-assign]

    def _record(self, key: GraphKey) -> ModelOutput:
        self.keys.append(key)
        return self._replay(key)

    def tokens(self, requests: list[Request]) -> dict[str, list[int]]:
        answers = _run(self.core, requests)
        return {name: _content(answer)[0] for (name, _), answer in answers.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_replayed_drafts_give_the_reference_tokens(family: str, tmp_path: Path) -> None:
    """Rows with and without drafts share a step, rows end one by one, and drafts that are longer
    than a graph's rows take the other path. The longest answer ends with the context."""
    model: PreTrainedModel = save_model(family, tmp_path)
    lengths = [30, 60, 20, 45, 88]
    requests = greedy_requests(lengths)
    pairs = zip(requests, lengths, strict=True)
    expected = {
        request.request_id: generate(model, list(request.prompt_token_ids), length)
        for request, length in pairs
    }
    for right in (0.0, 0.8):
        engine = DraftedEngine(tmp_path, expected, right)
        assert engine.tokens(requests) == expected
        drafted = [key for key in engine.keys if key.query_len == 8]
        assert len(drafted) > 15
        assert {key.size for key in drafted} >= {1, 2, 4}
        assert {key.query_len for key in engine.keys} <= {1, 8}


def test_long_drafts_replay_mixed_steps(tmp_path: Path) -> None:
    """Drafts of up to 9 tokens, beside prompts and decodes."""
    model: PreTrainedModel = save_model("qwen3", tmp_path)
    lengths = [30, 60, 20, 45, 50]
    requests = greedy_requests(lengths)
    expected = {
        request.request_id: generate(model, list(request.prompt_token_ids), length)
        for request, length in zip(requests, lengths, strict=True)
    }
    backend = CudaOnCpuBackend(sizes=SIZES, mixed=[12, 64])
    engine = DraftedEngine(tmp_path, expected, 0.9, backend)
    assert engine.tokens(requests) == expected
    mixed = [key for key in engine.keys if key.mixed]
    assert {key.size for key in mixed} == {12, 64}
    assert {key.query_len for key in engine.keys if not key.mixed} == {1, 8}


def test_there_are_no_such_graphs_without_drafts(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = make_config(tmp_path, **OPTIONS)
    worker = Worker(config, CudaOnCpuBackend(sizes=SIZES))
    assert not EngineCore(config, worker).info.speculates  # auto, and results may differ
    graphs = worker._runner._graphs
    assert graphs is not None
    assert GraphKey(4, False) in graphs and GraphKey(4, False, False, 8) not in graphs


@pytest.mark.parametrize(("tokens", "query_len"), [(3, 4), (15, 8)])
def test_rows_are_padded_to_the_longest_draft(tmp_path: Path, tokens: int, query_len: int) -> None:
    save_model("llama", tmp_path)
    config = make_config(tmp_path, speculation="ngram", num_speculative_tokens=tokens, **OPTIONS)
    worker = Worker(config, CudaOnCpuBackend(sizes=[1, 8, 40]))
    worker.load()
    worker.profile()
    graphs = worker._runner._graphs
    assert graphs is not None
    found = [size for size in (1, 8, 40) if GraphKey(size, False, False, query_len) in graphs]
    assert found == [1, 8]


def test_padded_rows_fit_the_tokens_of_a_step(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = make_config(tmp_path, **OPTIONS | {"max_num_batched_tokens": 20}, speculation="ngram")
    worker = Worker(config, CudaOnCpuBackend(sizes=SIZES))
    worker.load()
    worker.profile()
    graphs = worker._runner._graphs
    assert graphs is not None
    assert [size for size in SIZES if GraphKey(size, False, False, 8) in graphs] == [1, 2]


def test_rows_with_adapters_take_the_other_path(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    save_adapter(base, tmp_path / "a", seed=1, r=4, target_modules="all-linear")
    lengths = [30, 20, 20, 25, 30]
    requests = [
        replace(request, adapter="a" if index % 2 else None)
        for index, request in enumerate(greedy_requests(lengths))
    ]
    fields = {"enable_lora": True, "lora": (AdapterSource("a", str(tmp_path / "a")),)}
    plain = make_config(tmp_path / "base", **OPTIONS, **fields)
    core = EngineCore(plain, Worker(plain, CudaOnCpuBackend(sizes=SIZES)))
    expected = {name: _content(answer)[0] for (name, _), answer in _run(core, requests).items()}
    engine = DraftedEngine(tmp_path / "base", expected, 0.8, **fields)
    assert engine.tokens(requests) == expected
    assert not any(key.adapted and key.query_len > 1 for key in engine.keys)
