"""Test graphs of mixed steps without CUDA: padding, the choice of one, and what else runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from quire.engine.devices.cuda.mixed_graphs import MAX_TOKENS, max_prompts, mixed_sizes
from quire.engine.devices.cuda.step_graphs import NotCapturableError, Run
from quire.engine.devices.steps import GraphKey, ModelOutput
from quire.engine.lora import AdapterSource

from ..lora_models import save_adapter
from ..models import FAMILIES, generate, logprobs, save_model
from ..test_oracle import Engine
from ..worker_driver import Driver, make_config, make_prompts, make_sequence
from .cuda_on_cpu import CudaOnCpuBackend, RerunCapture

SIZES = [1, 2, 4, 8]
MIXED = [6, 16]
PROMPT_LENGTHS = [1, 5, 16, 17, 40, 61]


class Mixed:
    """A driver of a backend with graphs of mixed steps, and the keys of the graphs it replays."""

    def __init__(self, folder: Path, backend: CudaOnCpuBackend, **config: Any) -> None:
        self.driver = Driver.start(make_config(folder, **config), backend)
        self.runner = self.driver.worker._runner
        assert not self.runner._kv_cache.any()  # no capture has written anything
        self.keys = record_keys(self.runner)


def record_keys(runner: Any) -> list[GraphKey]:
    """Return a list to which each key is added that this runner replays."""
    keys: list[GraphKey] = []
    graphs = runner._graphs
    replay = graphs.replay

    def record(key: GraphKey) -> ModelOutput:
        keys.append(key)
        output: ModelOutput = replay(key)
        return output

    graphs.replay = record
    return keys


def sizes_in(keys: list[GraphKey]) -> set[int]:
    return {key.size for key in keys if key.mixed}


def test_the_ladder_depends_on_the_models_size() -> None:
    small = mixed_sizes(None, 600_000_000, 8192)
    assert small[:3] == [64, 128, 192] and small[-1] == 1664 and len(small) == 17
    assert mixed_sizes(None, 8_000_000_000, 8192) == [64]
    assert mixed_sizes(None, 70_000_000_000, 8192) == []
    assert mixed_sizes(None, 1, 8192)[-1] == MAX_TOKENS
    assert mixed_sizes(None, 1, 300) == [64, 128, 192, 256]
    assert mixed_sizes(0, 1, 8192) == mixed_sizes(1, 1, 8192) == []
    assert mixed_sizes(48, 1, 8192) == [48]
    assert mixed_sizes(200, 10**12, 8192) == [64, 128, 192, 200]
    assert mixed_sizes(4096, 10**12, 2100)[-2:] == [2048, 2100]
    assert max_prompts(64) == 16 and max_prompts(2048) == 64


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_replayed_steps_give_the_reference_tokens(family: str, tmp_path: Path) -> None:
    """Prompts arrive in chunks beside decodes, which end one by one."""
    model = save_model(family, tmp_path)
    mixed = Mixed(tmp_path, CudaOnCpuBackend(sizes=SIZES, mixed=MIXED))
    prompts = make_prompts(PROMPT_LENGTHS)
    lengths = [4 + 3 * i for i in range(len(prompts))]
    outputs = mixed.driver.run(
        [make_sequence(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    )
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output == generate(model, prompt, length)
    assert sizes_in(mixed.keys) == {16}
    assert len([key for key in mixed.keys if key.mixed]) == mixed.driver.mixed_steps
    assert mixed.runner._kv_cache[:, :, 0].count_nonzero() == 0  # block 0 stays unused


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    return tmp_path, save_model("llama", tmp_path)


def test_log_probabilities_of_prompts_are_those_of_the_model(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = llama
    mixed = Mixed(folder, CudaOnCpuBackend(sizes=SIZES, mixed=[9]), max_num_batched_tokens=9)
    sequences = [
        make_sequence(prompt, 6, logprobs=0, prompt_logprobs=0) for prompt in make_prompts([2, 20])
    ]
    mixed.driver.run(sequences)
    assert sizes_in(mixed.keys) == {9}
    for sequence in sequences:
        expected = logprobs(model, sequence.token_ids)
        got = mixed.driver.prompt_logprobs[sequence.seq_id] + mixed.driver.logprobs[sequence.seq_id]
        want = [expected[i, token].item() for i, token in enumerate(sequence.token_ids[1:])]
        assert [entry.logprob for entry in got] == pytest.approx(want, abs=1e-4)


def test_a_step_takes_the_next_larger_graph(llama: tuple[Path, PreTrainedModel]) -> None:
    """Steps of more tokens than the largest graph run without one, and so do those of more prompts
    than its grid has room for."""
    folder, model = llama
    backend = CudaOnCpuBackend(sizes=SIZES, mixed=[6, 12, 48])
    mixed = Mixed(folder, backend, max_num_batched_tokens=64, max_num_seqs=24, num_blocks=100)
    for lengths, sizes in (
        ([5], {6}), ([6], {6}), ([7], {12}), ([13, 30], {48}), ([49], set()), ([2] * 17, set()),
        ([2] * 16, {48}), ([1, 1], set()),
    ):  # fmt: skip
        mixed.keys.clear()
        prompts = make_prompts(lengths)
        outputs = mixed.driver.run([make_sequence(prompt, 3) for prompt in prompts])
        assert outputs == [generate(model, prompt, 3) for prompt in prompts]
        assert sizes_in(mixed.keys) == sizes, lengths


def test_a_step_ahead_and_forks_equal_generate(tmp_path: Path) -> None:
    """The token that the last step sampled is fed back into a mixed step, on the device."""
    model = save_model("qwen3", tmp_path)
    backend = CudaOnCpuBackend(sizes=SIZES, mixed=[8, 32])
    engine = Engine(
        tmp_path, backend, async_scheduling=True, max_num_seqs=8, max_num_batched_tokens=32
    )
    keys = record_keys(engine.worker._runner)
    prompts = make_prompts([3, 20, 9, 40, 33, 2, 18, 27, 1, 14])
    wanted = [(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted]
    engine.run()
    for request, (prompt, max_tokens) in zip(requests, wanted, strict=True):
        assert engine.tokens(request) == generate(model, prompt, max_tokens)
    assert {8, 32} >= sizes_in(keys) >= {32} and any(not key.mixed for key in keys)


def test_adapters_have_mixed_graphs_of_their_own(tmp_path: Path) -> None:
    base = save_model("qwen3", tmp_path / "base")
    adapted = save_adapter(base, tmp_path / "a", seed=1, r=4, target_modules="all-linear")
    engine = Engine(
        tmp_path / "base",
        CudaOnCpuBackend(sizes=SIZES, mixed=[16]),
        enable_lora=True,
        lora=(AdapterSource("a", str(tmp_path / "a")),),
        max_num_seqs=4,
        max_num_batched_tokens=16,
    )
    keys = record_keys(engine.worker._runner)
    models = {None: base, "a": adapted}
    for names in ([None], [None, "a"]):
        keys.clear()
        prompts = make_prompts([19, 23])
        pairs = list(zip(prompts, names, strict=False))
        requests = [engine.add(prompt, 5, adapter=name) for prompt, name in pairs]
        engine.run()
        for request, (prompt, name) in zip(requests, pairs, strict=True):
            assert engine.tokens(request) == generate(models[name], prompt, 5)
        assert {key.adapted for key in keys if key.mixed} == {"a" in names}


def test_a_shared_prefix_that_pays_is_read_once_without_a_graph(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    """Such a step saves more by its cascade than by a graph."""
    backend = CudaOnCpuBackend(sizes=SIZES, mixed=MIXED)
    mixed = Mixed(llama[0], backend)
    assert GraphKey(16, False, mixed=True) in mixed.runner._graphs  # type: ignore[operator]
    assert GraphKey(16, True, mixed=True) not in mixed.runner._graphs  # type: ignore[operator]
    mixed.runner.planner.find_shared = lambda host: False  # type: ignore[method-assign]
    mixed.driver.run([make_sequence(prompt, 2) for prompt in make_prompts([20])])
    assert sizes_in(mixed.keys) == {16, 6}


class FailingCapture(RerunCapture):
    """A capture that fails from its `count`-th run on."""

    def __init__(self, count: int, error: Exception) -> None:
        super().__init__()
        self._left, self._error = count, error

    def __call__(self, run: Run) -> Run:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().__call__(run)


@pytest.mark.parametrize(
    "error", [NotCapturableError("called a synchronizing operation"), RuntimeError("CUDA: no room")]
)
def test_mixed_steps_run_without_graphs_if_one_cannot_be_captured(
    llama: tuple[Path, PreTrainedModel], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Four decode graphs, two of them once more for shared prefixes, and one mixed one succeed."""
    folder, model = llama
    capture = FailingCapture(7, error)
    backend = CudaOnCpuBackend(sizes=SIZES, mixed=MIXED, capture=capture)
    mixed = Mixed(folder, backend)
    assert "steps with prompts run without CUDA graphs" in caplog.text
    assert mixed.runner.num_graphs == 6
    prompts = make_prompts([20, 5])
    outputs = mixed.driver.run([make_sequence(prompt, 4) for prompt in prompts])
    assert outputs == [generate(model, prompt, 4) for prompt in prompts]
    assert mixed.keys and not sizes_in(mixed.keys)
