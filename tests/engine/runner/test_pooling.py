"""Compare embeddings, however they are scheduled, with transformers' AutoModel pooled in torch."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModel

from quire.engine.body.body import BodyOutput
from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import InvalidRequestError, NonFiniteLogitsError
from quire.engine.outputs import SequenceOutput
from quire.engine.request import Pooling, Request
from quire.engine.runner import pooling as pooling_module
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

from ..models import VOCAB_SIZE, generate, save_model
from ..worker_driver import make_config

POOLINGS = tuple(pooling for pooling in get_args(Pooling) if pooling != "classify")
LENGTHS = [1, 2, 16, 17, 40, 61]
_ids = count()


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    save_model("qwen3", path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[Pooling, list[torch.Tensor]]:
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    vectors: dict[Pooling, list[torch.Tensor]] = {pooling: [] for pooling in POOLINGS}
    for prompt in make_prompts():
        with torch.no_grad():
            states = model(torch.tensor([prompt])).last_hidden_state[0]
        weights = torch.arange(1.0, len(prompt) + 1)[:, None]
        vectors["last"].append(states[-1])
        vectors["mean"].append(states.mean(0))
        vectors["weightedmean"].append((states * weights).sum(0) / weights.sum())
        vectors["max"].append(states.max(0).values)
    return vectors


class Engine:
    """A core that is stepped by hand."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        config = make_config(folder, **overrides)
        self.worker = Worker(config)
        self.core = EngineCore(config, self.worker)
        self.outputs: dict[str, list[SequenceOutput]] = {}

    def embed(self, prompt: list[int], pooling: Pooling) -> str:
        return self._add(prompt, SamplingParams(max_tokens=0), pooling)

    def generate(self, prompt: list[int], max_tokens: int) -> str:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return self._add(prompt, params, None)

    def _add(self, prompt: list[int], params: SamplingParams, pooling: Pooling | None) -> str:
        request = Request(
            request_id=f"p{next(_ids)}",
            prompt_token_ids=tuple(prompt),
            sampling_params=params,
            arrival_time=0.0,
            pooling=pooling,
        )
        self.core.add_request(request)
        self.outputs[request.request_id] = []
        return request.request_id

    def run(self) -> None:
        while self.core.has_work:
            for output in self.core.step().outputs:
                self.outputs[output.request_id].append(output)
        stats = self.core.stats()
        assert stats.num_free_blocks == stats.num_blocks

    def vector(self, request_id: str) -> torch.Tensor:
        (output,) = self.outputs[request_id]
        assert (output.finish_reason, output.token_ids, output.error) == ("stop", [], None)
        assert output.embedding is not None
        return torch.from_numpy(np.frombuffer(output.embedding, "<f4").copy())

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def assert_close(vector: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("budget", [16, 512])
def test_embeddings_match_one_by_one(
    folder: Path, expected: dict[Pooling, list[torch.Tensor]], pooling: Pooling, budget: int
) -> None:
    engine = Engine(folder, max_num_batched_tokens=budget)
    for prompt, vector in zip(make_prompts(), expected[pooling], strict=True):
        request_id = engine.embed(prompt, pooling)
        engine.run()
        assert_close(engine.vector(request_id), vector)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [16, 64])
def test_embeddings_match_among_generating_requests(
    folder: Path, expected: dict[Pooling, list[torch.Tensor]], budget: int, ahead: bool
) -> None:
    """All poolings run at once, and the generated tokens are the same as without them."""
    engine = Engine(folder, max_num_batched_tokens=budget, max_num_seqs=6, async_scheduling=ahead)
    prompts = make_prompts()
    reference = save_model("qwen3", folder)
    company = [engine.generate(prompt, 9) for prompt in prompts]
    embedded = {
        pooling: [engine.embed(prompt, pooling) for prompt in prompts] for pooling in POOLINGS
    }
    engine.run()
    for pooling, request_ids in embedded.items():
        for request_id, vector in zip(request_ids, expected[pooling], strict=True):
            assert_close(engine.vector(request_id), vector)
    for request_id, prompt in zip(company, prompts, strict=True):
        assert engine.tokens(request_id) == generate(reference, prompt, 9)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_match_after_preemption(
    folder: Path, expected: dict[Pooling, list[torch.Tensor]], pooling: Pooling
) -> None:
    """Two older requests grow until they need the whole pool while the prompt is half computed."""
    engine = Engine(folder, num_blocks=6, max_num_batched_tokens=16, max_model_len=96)
    prompts = make_prompts()
    for prompt in (prompts[2], prompts[4][:16]):
        engine.generate(prompt, 24)
    for _ in range(14):
        engine.core.step()
    request_id = engine.embed(prompts[-1], pooling)
    engine.run()
    assert engine.core.stats().preemptions >= 1
    assert_close(engine.vector(request_id), expected[pooling][-1])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_match_with_a_cached_prefix(
    folder: Path, expected: dict[Pooling, list[torch.Tensor]], pooling: Pooling
) -> None:
    """Without computing every token, only the state of the last one is available."""
    engine = Engine(folder)
    prompt, vector = make_prompts()[-1], expected[pooling][-1]
    for warm in (False, True, True):
        request_id = engine.embed(prompt, pooling)
        engine.run()
        assert_close(engine.vector(request_id), vector)
        (output,) = engine.outputs[request_id]
        hit = len(prompt) - 1 if warm and pooling == "last" else 0
        assert output.num_cached_tokens == hit
    # What was computed for an embedding serves everyone.
    request_id = engine.generate(prompt, 2)
    engine.run()
    assert engine.outputs[request_id][-1].num_cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_step_that_runs_out_of_memory_is_retried(
    folder: Path,
    expected: dict[Pooling, list[torch.Tensor]],
    pooling: Pooling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first prompt's second chunk is pooled and lost, since the other's first one fails."""
    engine = Engine(folder, max_num_batched_tokens=32)
    pool, calls = pooling_module._pool, count(1)

    def fail_once(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise torch.OutOfMemoryError
        return pool(*args)

    monkeypatch.setattr(pooling_module, "_pool", fail_once)
    request_ids = [engine.embed(prompt, pooling) for prompt in make_prompts()[:-3:-1]]
    engine.run()
    assert engine.core.stats().preemptions == 1
    for request_id, vector in zip(request_ids, expected[pooling][:-3:-1], strict=True):
        assert_close(engine.vector(request_id), vector)


def test_non_finite_states_fail_only_their_request(
    folder: Path, expected: dict[Pooling, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(folder, max_num_batched_tokens=512)
    model = engine.worker._runner._model
    forward = model.forward_to_logits

    def with_nan(*args: Any, **options: Any) -> BodyOutput:
        output = forward(*args, **options)
        output.hidden[20, 3] = torch.nan  # of the first prompt, the 21st token
        return output

    monkeypatch.setattr(model, "forward_to_logits", with_nan)
    prompts = make_prompts()
    bad, good = engine.embed(prompts[4], "mean"), engine.embed(prompts[5], "mean")
    engine.run()
    (output,) = engine.outputs[bad]
    assert output.embedding is None
    assert output.error is not None
    assert output.error.code == NonFiniteLogitsError.code
    assert_close(engine.vector(good), expected["mean"][5])


def test_an_embedding_samples_nothing() -> None:
    with pytest.raises(InvalidRequestError, match="samples nothing"):
        Request(
            request_id="r",
            prompt_token_ids=(1,),
            sampling_params=SamplingParams(max_tokens=1),
            arrival_time=0.0,
            pooling="last",
        )
