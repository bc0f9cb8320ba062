"""Compare the worker with transformers itself: every family, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from transformers import PreTrainedModel

from quire.engine.errors import DeviceMemoryError, NonFiniteLogitsError
from quire.engine.outputs import RowError
from quire.engine.runner import model_runner, pending_results
from quire.engine.sampling.batch import SamplingBatch
from quire.engine.step import UNKNOWN_TOKEN, BlockCopy, SequenceSpec
from quire.kernels.cpu import sampling as cpu_sampling

from ..models import FAMILIES, generate, logprobs, save_model
from ..worker_driver import Driver, make_config, make_prompts, make_sequence

PROMPTS = make_prompts([1, 5, 16, 17, 40, 61])
MAX_TOKENS = 12


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel, list[list[int]]]:
    """Return folder, reference model and its continuations of `PROMPTS`."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(request.param, folder)
    return (
        folder,
        model,
        [generate(model, prompt, MAX_TOKENS) for prompt in PROMPTS],
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_model("llama", folder)


@pytest.mark.parametrize("block_size", [16, 64])
def test_chunked_and_mixed_batches_give_the_reference_tokens(
    family: tuple[Path, PreTrainedModel, list[list[int]]], block_size: int
) -> None:
    folder, _, expected = family
    driver = Driver.start(make_config(folder, block_size=block_size))
    sequences = [make_sequence(prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert driver.run(sequences) == expected
    assert driver.mixed_steps > 3


def test_one_large_prefill_gives_the_reference_tokens(
    family: tuple[Path, PreTrainedModel, list[list[int]]],
) -> None:
    folder, _, expected = family
    driver = Driver.start(make_config(folder, max_num_batched_tokens=512))
    assert driver.run([make_sequence(prompt, MAX_TOKENS) for prompt in PROMPTS]) == expected
    assert driver.steps == MAX_TOKENS


def test_logprobs_equal_those_of_the_reference(
    family: tuple[Path, PreTrainedModel, list[list[int]]],
) -> None:
    folder, model, _ = family
    driver = Driver.start(make_config(folder))
    sequences = [make_sequence(prompt, 4, logprobs=3, prompt_logprobs=2) for prompt in PROMPTS]
    driver.run(sequences)
    for sequence in sequences:
        expected = logprobs(model, sequence.token_ids)
        prompt_entries = driver.prompt_logprobs[sequence.seq_id]
        assert len(prompt_entries) == sequence.num_prompt_tokens - 1
        entries = prompt_entries + driver.logprobs[sequence.seq_id]
        assert len(entries) == len(sequence.token_ids) - 1
        for position, entry in enumerate(entries):
            assert entry.token_id == sequence.token_ids[position + 1]
            got = torch.tensor([entry.logprob, *entry.top_logprobs])
            ids = [entry.token_id, *entry.top_token_ids]
            torch.testing.assert_close(got, expected[position][ids], atol=1e-4, rtol=1e-4)
            best = expected[position].topk(len(entry.top_logprobs)).values
            torch.testing.assert_close(got[1:], best, atol=1e-4, rtol=1e-4)


def test_a_released_sequence_starts_over_with_other_blocks(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = llama
    driver = Driver.start(make_config(folder))
    prompts = make_prompts([30, 20])
    first, second = (make_sequence(prompt, 10) for prompt in prompts)
    for _ in range(6):
        driver.step([first, second])
    assert second.num_output_tokens > 0
    driver.release(second)
    driver.run([first, second])
    for sequence, prompt in zip((first, second), prompts, strict=True):
        assert sequence.token_ids[len(prompt) :] == generate(model, prompt, 10)


def test_a_copied_block_replaces_its_source(llama: tuple[Path, PreTrainedModel]) -> None:
    """A fork shares the full blocks of its parent and gets a copy of the partial one."""
    folder, model = llama
    driver = Driver.start(make_config(folder, max_num_batched_tokens=64))
    prompt = make_prompts([24])[0]
    parent = make_sequence(prompt, 8)
    driver.step([parent])
    child = make_sequence(prompt, 8)
    copy = driver.free_blocks.pop()
    child.block_table = [parent.block_table[0], copy]
    child.num_computed_tokens = len(prompt) - 1
    driver.copies = [BlockCopy(parent.block_table[1], copy)]
    driver.step([child, parent])  # the child computes only the prompt's last token
    while child.num_output_tokens < 8:
        driver.step([child])
    assert child.token_ids[len(prompt) :] == generate(model, prompt, 8)


def test_only_the_row_with_nan_fails_and_its_blocks_affect_no_other(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = llama
    driver = Driver.start(make_config(folder, max_num_batched_tokens=128))
    canary, victim = (make_sequence(prompt, 30) for prompt in make_prompts([20, 18]))
    driver.step([canary, victim])
    cache = driver.worker._runner._kv_cache
    poisoned = set(victim.block_table)
    cache[:, :, victim.block_table] = torch.nan
    output, result = driver.step([canary, victim])
    row = output.seq_ids.index(victim.seq_id)
    assert result.errors[row].code == NonFiniteLogitsError.code
    assert list(result.errors) == [row] and result.token_ids[row] is None
    assert result.token_ids[1 - row] is not None
    driver.release(victim)
    heirs = [make_sequence(prompt, 30) for prompt in make_prompts([1, 3, 20])]
    assert set(driver.free_blocks[-2:]) == poisoned
    driver.run([canary, *heirs])
    for sequence in (canary, *heirs):
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        assert sequence.token_ids[len(prompt) :] == generate(model, prompt, 30)


def test_only_the_row_that_raises_in_the_sampler_fails(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = llama
    driver = Driver.start(make_config(folder, max_num_batched_tokens=64))
    prompts = make_prompts([3, 4, 5])
    first, offender, last = (make_sequence(prompt, 6, logprobs=0) for prompt in prompts)
    sampler = driver.worker._runner._sampler
    prepare = sampler.prepare

    def fail_with_offender(sequences: list[SequenceSpec], **options: Any) -> SamplingBatch:
        if offender.seq_id in [spec.seq_id for spec in sequences]:
            raise KeyError("no such mask")
        return prepare(sequences, **options)

    monkeypatch.setattr(sampler, "prepare", fail_with_offender)
    output, result = driver.step([first, offender, last])
    row = output.seq_ids.index(offender.seq_id)
    assert result.errors == {row: RowError("step_failed", "its row raised in the sampler")}
    assert result.token_ids[row] is None
    assert sorted(result.logprobs) == sorted({0, 1, 2} - {row})
    driver.run([first, last])
    for sequence, prompt in ((first, prompts[0]), (last, prompts[2])):
        assert sequence.token_ids[len(prompt) :] == generate(model, prompt, 6)

    def fail(_: list[SequenceSpec], **__: Any) -> SamplingBatch:
        raise KeyError("not a row's fault")

    monkeypatch.setattr(sampler, "prepare", fail)
    with pytest.raises(KeyError):
        driver.step([make_sequence([5, 6], 2), make_sequence([5, 6], 2)])


def test_penalised_rows_that_failed_may_be_in_the_next_step(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are if the engine runs one step ahead, and their history lacks a token."""
    driver = Driver.start(make_config(llama[0]))
    offenders = [make_sequence([5, 6, token], 6, presence_penalty=1.0) for token in (7, 8)]
    sampler = driver.worker._runner._sampler
    prepare = sampler.prepare

    def fail_with_offenders(sequences: list[SequenceSpec], **options: Any) -> SamplingBatch:
        if any(spec.sampling_params.has_penalties for spec in sequences):
            raise KeyError("no such mask")
        return prepare(sequences, **options)

    driver.step(offenders)
    monkeypatch.setattr(sampler, "prepare", fail_with_offenders)
    _, result = driver.step([*offenders, make_sequence([5, 6], 1)])
    assert sorted(result.errors) == [0, 1]
    monkeypatch.setattr(sampler, "prepare", prepare)
    for sequence in offenders:
        sequence.token_ids.append(UNKNOWN_TOKEN)
    _, result = driver.step(offenders)
    assert result.errors == {}


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
def test_a_device_fault_in_the_sampler_is_blamed_on_no_row(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    driver = Driver.start(make_config(llama[0]))

    def fail(*_: Any, **__: Any) -> SamplingBatch:
        raise fault

    monkeypatch.setattr(driver.worker._runner._sampler, "prepare", fail)
    with pytest.raises(type(fault)):
        driver.step([make_sequence([5, 6, 7], 2)])


def test_without_memory_after_the_sampling_a_step_can_be_tried_again(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of rows that were sampled one by one have to be put together on the device."""
    folder, model = llama
    driver = Driver.start(make_config(folder))
    sequence = make_sequence([5, 6, 7], 2)
    joined = model_runner.joined

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    output = driver.schedule([sequence])
    monkeypatch.setattr(model_runner, "joined", fail)
    with pytest.raises(DeviceMemoryError):
        driver.launch(output)
    monkeypatch.setattr(model_runner, "joined", joined)
    output = output._replace(new_sequences=[])
    assert driver.launch(output).token_ids == generate(model, [5, 6, 7], 1)


def test_running_out_of_memory_in_a_copy_stops_the_engine(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry of the step would have no copies and would read the old content of the blocks."""
    driver = Driver.start(make_config(llama[0]))

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(driver.worker._runner, "copy_blocks", fail)
    with pytest.raises(RuntimeError, match="for copies of blocks"):
        driver.step([make_sequence([5, 6, 7], 2)])


class LateDownloads:
    """Copies that arrive when they are waited for, and not before."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.zeros_like(tensor)
        self._copies.append((host, tensor))
        return host

    def end(self) -> None:
        pass

    def wait(self) -> None:
        for host, tensor in self._copies:
            host.numpy()[...] = tensor.numpy()


def test_results_wait_for_the_device(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_results, "Downloads", LateDownloads)
    folder, model = llama
    driver = Driver.start(make_config(folder))
    (tokens,) = driver.run([make_sequence([5, 6, 7], 4)])
    assert tokens == generate(model, [5, 6, 7], 4)


def test_a_step_without_rows_applies_releases(llama: tuple[Path, PreTrainedModel]) -> None:
    driver = Driver.start(make_config(llama[0], max_num_seqs=1))
    first, second = (make_sequence([5, 6, 7], 2) for _ in range(2))
    driver.run([first])
    assert driver.run([second]) == [first.token_ids[3:]]


def test_the_start_compiles_all_that_draws_need(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, str]] = set()

    def recorded(name: str) -> Any:
        kernel = getattr(cpu_sampling, name)

        def call(*arguments: Any) -> None:
            seen.add((name, str([numba.typeof(argument) for argument in arguments])))
            kernel(*arguments)

        return call

    for name in ("draw", "race"):
        monkeypatch.setattr(cpu_sampling, name, recorded(name))
    driver = Driver.start(make_config(llama[0]))
    compiled = set(seen)
    assert {name for name, _ in compiled} == {"draw", "race"}
    shapes: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"logit_bias": ((3, 1.0),)},
        {"top_k": 3, "top_p": 0.5, "presence_penalty": 1.0},
    ]
    driver.run([make_sequence([5, 6], 3, temperature=0.8, seed=1, **shape) for shape in shapes])
    assert seen == compiled
