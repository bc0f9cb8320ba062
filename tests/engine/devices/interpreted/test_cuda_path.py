"""Compare the runner's CUDA path and its Triton kernels with torch on small random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.olmo2 import Olmo2Config

from quire.engine.core.engine_core import EngineCore
from quire.engine.devices.cuda.attention import CudaPlanner
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Sequence
from quire.engine.step import BlockCopy
from quire.kernels.cuda.attention import decode_schedule
from quire.kernels.prefix_groups import PrefixGroup, find_prefix_groups

from ... import latent_models
from ...checkpoints.quantized_files import FORMATS, write_model
from ...models import (
    COMMON,
    FAMILIES,
    GEMMA4,
    WIDE_HEADS,
    build_model,
    gemma4,
    generate,
    logprobs,
    not_flat,
)
from ...worker_driver import Driver, make_config, make_sequence
from ..cuda_on_cpu import CudaOnCpuBackend, interpreted

WIDE_GEMMA: dict[str, Any] = {
    "head_dim": 128,
    "global_head_dim": 512,  # whose tiles are those of wide heads
    "layer_types": ["sliding_attention", "full_attention"],
}
SHARED: dict[str, Any] = {
    **WIDE_GEMMA,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON, head_dim=16),
    "llama-gelu": lambda: LlamaConfig(**COMMON, head_dim=16, hidden_act="gelu"),
    "qwen3": FAMILIES["qwen3"],
    "gpt_oss": FAMILIES["gpt_oss"],  # sinks, experts, and only some layers with a window
    "glm4": FAMILIES["glm4"],
    "olmo2": lambda: Olmo2Config(**COMMON | WIDE_HEADS),
    "not flat": not_flat,
    "latents": latent_models.FAMILIES["youtu"],
    "gemma4": lambda: gemma4(**GEMMA4["experts"] | WIDE_GEMMA | {"enable_moe_block": False}),
    "gemma4 shared": lambda: gemma4(**GEMMA4["shared"] | SHARED),
    "gemma4 one head": lambda: gemma4(**GEMMA4["one head"] | SHARED),
}


@pytest.fixture(autouse=True)
def _small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for few programs, because the interpreter runs them one after another."""
    monkeypatch.setattr(decode_schedule, "DEFAULT_NUM_SMS", 2)


@pytest.fixture(params=["qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    built = build_model(MODELS[request.param]())
    built.save_pretrained(tmp_path)
    return built


def start(folder: Path, backend: CudaOnCpuBackend | None = None, **config: Any) -> Driver:
    return Driver.start(make_config(folder, **config), backend or interpreted())


def make_prompt(length: int, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def found_logprobs(driver: Driver, sequence: Sequence) -> torch.Tensor:
    """Return the log-probability of each token after the first, given those before it."""
    entries = driver.prompt_logprobs[sequence.seq_id] + driver.logprobs[sequence.seq_id]
    return torch.tensor([entry.logprob for entry in entries])


def check(driver: Driver, sequence: Sequence, model: PreTrainedModel) -> None:
    """Check that the sequence's log-probabilities equal those of transformers. Gemma 4 does not
    scale its scores, so those of wide heads are in the hundreds, and their last bits count more."""
    tolerance = 1e-4 if model.config.model_type == "gemma4_text" else 1e-5
    expected = logprobs(model, sequence.token_ids)
    wanted = [expected[i, token] for i, token in enumerate(sequence.token_ids[1:])]
    found = found_logprobs(driver, sequence)
    torch.testing.assert_close(
        found, torch.stack(wanted)[-len(found) :], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(
    "model,mixed",
    [
        *((name, []) for name in sorted(MODELS.keys() - {"llama", "gpt_oss", "gemma4 one head"})),
        ("gpt_oss", [16]),
        ("gemma4 one head", [16]),
        ("qwen3", [8, 16]),
    ],
    indirect=["model"],
)
def test_chunked_prefill_and_decode_match_transformers(
    model: PreTrainedModel, tmp_path: Path, mixed: list[int]
) -> None:
    backend = interpreted(sizes=[4] if mixed else [], mixed=mixed)
    driver = start(tmp_path, backend)
    sequences = [
        make_sequence(make_prompt(length), 3, logprobs=0, prompt_logprobs=0)
        for length in (1, 17, 21)
    ]
    driver.run(sequences)
    for sequence in sequences:
        check(driver, sequence, model)
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        assert sequence.token_ids == prompt + generate(model, prompt, 3)
    assert driver.mixed_steps > 1
    assert backend.reruns.num_replays == (driver.steps if mixed else 0)


class RecordedGroups:
    """A finder that accepts groups of any size, and records those of each step."""

    def __init__(self) -> None:
        self.steps: list[list[PrefixGroup]] = []
        self._find = partial(find_prefix_groups, min_tokens=16, min_members=2, launch_bytes=0)

    def __call__(self, *args: Any, **options: Any) -> list[PrefixGroup]:
        self.steps.append(self._find(*args, **options))
        return self.steps[-1]


def share(driver: Driver, parent: Sequence, max_tokens: list[int]) -> list[Sequence]:
    """Make sequences that find all full blocks of `parent`'s prompt in the prefix cache."""
    blocks = (parent.num_prompt_tokens - 1) // driver.block_size
    found = []
    for seed, length in enumerate(max_tokens):
        shared = list(parent.token_ids[: blocks * driver.block_size])
        sequence = make_sequence(shared + make_prompt(3, seed), length, logprobs=0)
        sequence.block_table = parent.block_table[:blocks]
        sequence.other_tables = [table[:blocks] for table in parent.other_tables]
        sequence.num_computed_tokens = len(shared)
        found.append(sequence)
    return found


@pytest.mark.parametrize("model,graphs", [("qwen3", True), ("gpt_oss", False)], indirect=["model"])
def test_shared_prefixes_match_transformers(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Two groups come and go next to a row that shares nothing; their members are not adjacent."""
    groups = RecordedGroups()
    backend = interpreted(find_groups=groups, sizes=[4, 8] if graphs else [])
    driver = start(tmp_path, backend, max_num_batched_tokens=48)
    parents = [make_sequence(make_prompt(length, length), 6, logprobs=0) for length in (35, 20)]
    for parent in parents:
        driver.step([parent])
    alone = make_sequence(make_prompt(5), 3, logprobs=0)
    first, second = share(driver, parents[0], [2, 4]), share(driver, parents[1], [5, 3])
    sequences = [parents[1], first[0], alone, parents[0], *second, first[1]]
    for sequence in sequences:
        while sequence.num_computed_tokens < len(sequence.token_ids) - 1:
            driver.step([sequence])
    # Shared blocks must outlive the first that gives them back.
    monkeypatch.setattr(driver, "release", lambda ended: driver.released.append(ended.seq_id))
    driver.run(sequences)
    for sequence in sequences:
        check(driver, sequence, model)
    served = [sorted(len(group.members) for group in step) for step in groups.steps]
    assert {(3, 3), (2, 3), (2, 2), (2,)} <= {tuple(step) for step in served}
    assert backend.reruns.num_replays > 2 or not graphs
    planner = driver.worker._runner.planner
    assert isinstance(planner, CudaPlanner) and planner.shared_prefixes is not None
    shared = planner.shared_prefixes
    ((members, length),) = [step for step in groups.steps if step][-1]
    expected = torch.zeros(8, dtype=torch.int32)
    expected[list(members)] = length
    assert torch.equal(shared.workspace.prefix_lens, expected)


def read_twice(driver: Driver, prompt: list[int]) -> torch.Tensor:
    """Return a sequence's log-probabilities; check that a fork within a block gets the same."""
    parent = make_sequence(prompt, 4, logprobs=0, prompt_logprobs=0)
    driver.run([parent])
    blocks, offset = divmod(len(prompt) - 1, driver.block_size)
    child = make_sequence(prompt, 4, logprobs=0)
    again = make_sequence(prompt, 2)
    while again.num_computed_tokens < len(prompt):
        driver.step([again])
    tables = []
    for table in (again.block_table, *again.other_tables):
        copy = driver.free_blocks.pop(0)
        assert offset > 0 and copy not in table
        driver.copies.append(BlockCopy(table[blocks], copy))
        tables.append([*table[:blocks], copy])
    child.block_table, *child.other_tables = tables
    child.num_computed_tokens = len(prompt) - 1
    driver.run([child])
    assert child.token_ids == parent.token_ids
    found = found_logprobs(driver, child)
    torch.testing.assert_close(found, found_logprobs(driver, parent)[-4:], atol=1e-5, rtol=1e-5)
    return found_logprobs(driver, parent)


@pytest.mark.parametrize("model", ["llama", "gpt_oss"], indirect=True)
def test_a_float8_cache_with_scales_matches_plain_attention(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    """A float8 cache gives what plain attention gives over the same cache, dequantised.

    The rounding must show against exact attention, but not by much.
    """
    prompt = make_prompt(18)
    write_scales(tmp_path, model)
    found = []
    for backend in (interpreted(), CudaOnCpuBackend()):
        driver = start(tmp_path, backend, kv_cache_dtype="fp8")
        assert driver.worker._runner._kv_cache.dtype == torch.float8_e4m3fn
        found.append(read_twice(driver, prompt))
        assert driver.worker._runner._kv_scales is not None
    exact = logprobs(model, prompt)
    wanted = torch.stack([exact[i, token] for i, token in enumerate(prompt[1:])])
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    error = (found[0][: len(wanted)] - wanted).abs().mean()
    assert 1e-4 < error < 0.3


@pytest.mark.parametrize("form", ["packed-4-asymmetric", "gptq-8"])
def test_grouped_weights_match_dequantised_ones(tmp_path: Path, form: str) -> None:
    model = write_model(tmp_path, "qwen3", FORMATS[form])
    driver = start(tmp_path / "quantised")
    sequence = make_sequence(make_prompt(7), 3, logprobs=0, prompt_logprobs=0)
    driver.run([sequence])
    assert "-bit groups" in driver.worker._model.weights.computed_format
    check(driver, sequence, model)


def write_scales(folder: Path, model: PreTrainedModel) -> None:
    """Add scales to the weights in the folder, as a calibrated checkpoint has them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(model.config.num_hidden_layers):
        for name, scale in (("k", 0.02), ("v", 0.01)):
            tensors[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.tensor(scale)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kv_cache_dtype,ahead", [("auto", True), ("fp8_e4m3", False)])
def test_prefixes_shared_by_the_scheduler_form_groups(
    model: PreTrainedModel, tmp_path: Path, kv_cache_dtype: str, ahead: bool
) -> None:
    """Forks, a prefix hit and an embedding run together through the whole engine.

    One step ahead, the kernel that prepares a step reads the tokens of the previous one where they
    were sampled.
    """
    groups = RecordedGroups()
    config = make_config(
        tmp_path,
        kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=64,
        async_scheduling=ahead,
    )
    core = EngineCore(config, Worker(config, interpreted(find_groups=groups)))
    prompt = make_prompt(20)
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, n=3)
    last = [*prompt[:18], 9, 8]
    for name, ids, how, pooling in (
        ("fork", prompt, params, None),
        ("hit", last, replace(params, n=1), None),
        ("vector", prompt, SamplingParams(max_tokens=0), "last"),
    ):
        core.add_request(
            Request(
                request_id=name,
                prompt_token_ids=tuple(ids),
                sampling_params=how,
                arrival_time=0.0,
                pooling=pooling,  # type: ignore[arg-type]
            )
        )
    outputs: dict[tuple[str, int], list[int]] = {}
    vectors = []
    while core.has_work:
        for output in core.step().outputs:
            outputs.setdefault((output.request_id, output.choice), []).extend(output.token_ids)
            vectors += [output.embedding] if output.embedding is not None else []
    assert max(len(group.members) for step in groups.steps for group in step) >= 3
    with torch.no_grad():
        states = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
    vector = torch.from_numpy(np.frombuffer(vectors[0], "<f4").copy())
    assert outputs["fork", 0] == outputs["fork", 1] == outputs["fork", 2]
    if kv_cache_dtype == "auto":
        assert outputs["fork", 0] == generate(model, prompt, 3)
        assert outputs["hit", 0] == generate(model, last, 3)
        torch.testing.assert_close(vector, states[-1], rtol=1e-5, atol=1e-5)
    else:
        error = (vector - states[-1]).norm() / states[-1].norm()
        assert 1e-4 < error < 0.1
