"""Compare the whole engine with Hugging Face, in fp32, token for token.

Whatever is chunked, preempted, shared, forked or batched, the tokens are those of `generate`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.devices.backend import Backend
from quire.engine.devices.cpu.attention import CpuPlan, CpuPlanner
from quire.engine.devices.cpu.packing import rounded
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.layers.layer_groups import blocks_needed
from quire.engine.model.model_spec import read_hf_config, spec_from_hf_config
from quire.engine.outputs import SequenceOutput
from quire.engine.request import Request
from quire.engine.runner.kv_cache import choose_groups
from quire.engine.runner.model_runner import StepForward
from quire.engine.runner.worker import Worker
from quire.engine.step import UNKNOWN_TOKEN, SchedulerOutput

from . import models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .harness import make_request


class Engine:
    """An EngineCore over a real model, with all its outputs. `num_blocks` counts for each of the
    model's groups of layers; 0 stands for as few as a sequence of full length needs."""

    def __init__(self, folder: Path, backend: Backend | None = None, **config: Any) -> None:
        values: dict[str, Any] = {
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",  # K and V too, as in the reference
            "num_blocks": 256,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 512,
            "max_model_len": 192,
            "num_threads": 1,
        }
        values |= config
        if values["num_blocks"] is not None:
            values["num_blocks"] = total_blocks(values)
        self.config = EngineConfig(**values)
        self.worker = self.make_worker(self.config, backend)
        self.core = EngineCore(self.config, self.worker)
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = defaultdict(list)

    def make_worker(self, config: EngineConfig, backend: Backend | None) -> Worker:
        return Worker(config, backend)

    def add(self, prompt: list[int], max_tokens: int, **fields: Any) -> Request:
        request = make_request(
            prompt, max_tokens, **{"temperature": 0.0, "ignore_eos": True} | fields
        )
        self.core.add_request(request)
        return request

    def step(self) -> None:
        for output in self.core.step().outputs:
            assert output.error is None, output.error
            self.outputs[output.request_id, output.choice].append(output)

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        stats = self.core.stats()
        assert stats.num_free_blocks == stats.num_blocks

    def tokens(self, request: Request, choice: int = 0) -> list[int]:
        return [t for output in self.outputs[request.request_id, choice] for t in output.token_ids]

    def complete(self, prompt: list[int], max_tokens: int, **fields: Any) -> list[int]:
        request = self.add(prompt, max_tokens, **fields)
        self.run()
        return self.tokens(request)


def total_blocks(values: dict[str, Any]) -> int:
    """Return the number of blocks for all groups of layers of an engine with this configuration."""
    config = EngineConfig(**values | {"num_blocks": None})
    spec = spec_from_hf_config(read_hf_config(config, open_checkpoint(config)), config)
    length = spec.resolve_max_model_len(config.max_model_len)
    windows = choose_groups(config, spec, length).windows
    step_tokens = values["max_num_batched_tokens"] * (1 + bool(config.async_scheduling))
    least = blocks_needed(windows, config.block_size, length - 1, step_tokens=step_tokens)
    return len(windows) * values["num_blocks"] or least


class Reference:
    """The Hugging Face model, which remembers its continuations."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], list[int]] = {}

    def complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        known = self._known.get(tuple(prompt), [])
        if len(known) < max_tokens:
            known = self._known[tuple(prompt)] = models.generate(self.model, prompt, max_tokens)
        return known[:max_tokens]


@pytest.fixture(scope="module", params=list(models.FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp(request.param)
    yield folder, Reference(models.save_model(request.param, folder))


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    """Make prompts of which half share a prefix, cut anywhere.

    Their lengths cross the sliding window and block borders.
    """
    rng = random.Random(7)
    stem = [rng.randrange(3, models.VOCAB_SIZE) for _ in range(longest)]
    made = []
    for i in range(count):
        shared = stem[: rng.randrange(longest - 20)] if i % 2 else []
        own = [rng.randrange(3, models.VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]
        made.append(shared + own)
    return made


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 14, "max_num_batched_tokens": 64},
    "preempted-uncached": {"num_blocks": 14, "enable_prefix_caching": False},
    "blocks-of-64": {"block_size": 64, "num_blocks": 64},
    "chunked-blocks-of-64": {"block_size": 64, "num_blocks": 64, "max_num_batched_tokens": 16},
    "preempted-ahead": {"async_scheduling": True, "num_blocks": 14, "max_num_batched_tokens": 64},
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_generate(family: tuple[Path, Reference], mode: str) -> None:
    """32 mixed requests run at once, then the same ones again with every prefix cached."""
    folder, reference = family
    engine = Engine(folder, **MODES[mode])
    wanted = [(prompt, 6 + i % 20) for i, prompt in enumerate(prompts(32))]
    for _ in range(2):
        requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted]
        engine.run()
        for request, (prompt, max_tokens) in zip(requests, wanted, strict=True):
            assert engine.tokens(request) == reference.complete(prompt, max_tokens)
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    assert (stats.prefix_hits > 0) == engine.config.enable_prefix_caching


def test_decode_graphs_one_step_ahead_equal_generate(
    family: tuple[Path, Reference],
) -> None:
    """The token sampled by the last step is fed back into static inputs, on the device."""
    folder, reference = family
    backend = CudaOnCpuBackend(sizes=graph_sizes(11))
    engine = Engine(folder, backend, async_scheduling=True, max_num_seqs=11)
    wanted = [(prompt, 6 + i % 20) for i, prompt in enumerate(prompts(16))]
    requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted]
    engine.run()
    for request, (prompt, max_tokens) in zip(requests, wanted, strict=True):
        assert engine.tokens(request) == reference.complete(prompt, max_tokens)
    assert backend.reruns.num_replays > 15


def test_greedy_forks_equal_generate(family: tuple[Path, Reference]) -> None:
    folder, reference = family
    for num_blocks, ahead in ((64, False), (12, False), (12, True)):  # 12: forks are preempted
        engine = Engine(folder, num_blocks=num_blocks, async_scheduling=ahead)
        prompt = prompts(2, longest=60)[1]
        request = engine.add(prompt, 40, n=4)
        engine.run()
        for choice in range(4):
            assert engine.tokens(request, choice) == reference.complete(prompt, 40)
    assert engine.core.stats().blocks_copied > 0


def prompts_with_a_stem() -> list[list[int]]:
    """Return six prompts whose first 140 tokens are the same."""
    rng = random.Random(1)
    stem = [rng.randrange(3, models.VOCAB_SIZE) for _ in range(140)]
    return [stem + [3 + i] * (i + 1) for i in range(6)]


def shared_by_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets, for each step on the CPU, the most keys that a tile's rows share."""
    shared = []
    cut = CpuPlanner.cut

    def keep(planner: CpuPlanner, *arguments: Any) -> CpuPlan:
        made = cut(planner, *arguments)
        shared.append(int(made.tiles[:, 2].max(initial=0)))
        return made

    monkeypatch.setattr(CpuPlanner, "cut", keep)
    return shared


def test_reading_a_shared_prefix_once_equals_generate(
    family: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = family
    shared, wanted = shared_by_tiles(monkeypatch), prompts_with_a_stem()
    for disabled in (False, True):
        engine = Engine(folder, disable_cascade_attn=disabled)
        requests = [engine.add(prompt, 30) for prompt in wanted]
        shared.clear()
        engine.run()
        for request, prompt in zip(requests, wanted, strict=True):
            assert engine.tokens(request) == reference.complete(prompt, 30)
        has_full_layers = None in engine.worker._model.spec.windows
        assert max(shared) == (128 if has_full_layers and not disabled else 0)


def test_logprobs_equal_the_reference(family: tuple[Path, Reference]) -> None:
    """This covers chosen tokens and the prompt, in chunks and after cached prefixes."""
    folder, reference = family
    engine = Engine(folder, max_num_batched_tokens=16)
    prompt = prompts(4)[3]
    for _ in range(2):  # the second time, the prefix is cached
        request = engine.add(prompt, 10, logprobs=5, prompt_logprobs=3)
        warm = engine.add(prompt, 10, logprobs=5, logprob_token_ids=(7, 0, 90))
        engine.run()
        outputs = engine.outputs[request.request_id, 0]
        tokens = engine.tokens(request)
        want = models.logprobs(reference.model, prompt + tokens)
        prompt_logprobs = outputs[0].prompt_logprobs
        assert prompt_logprobs is not None and prompt_logprobs[0] is None
        assert len(prompt_logprobs) == len(prompt)
        for position, entry in enumerate(prompt_logprobs[1:], start=1):
            assert entry is not None and entry.token_id == prompt[position]
            expected = want[position - 1]
            assert entry.logprob == pytest.approx(expected[prompt[position]].item(), abs=1e-4)
            best = expected.topk(3).values
            assert torch.allclose(torch.tensor(entry.top_logprobs), best, atol=1e-4)
        for one in (request, warm):
            entries = [e for o in engine.outputs[one.request_id, 0] for e in o.logprobs or []]
            assert [entry.token_id for entry in entries] == tokens
            for i, entry in enumerate(entries):
                expected = want[len(prompt) + i - 1]
                assert entry.rank == 1 and entry.logprob == entry.top_logprobs[0]
                assert entry.logprob == pytest.approx(expected[tokens[i]].item(), abs=1e-4)
                best = expected.topk(5).values
                assert torch.allclose(torch.tensor(entry.top_logprobs), best, atol=1e-4)
                if one is warm:
                    named = torch.tensor(entry.named_logprobs)
                    assert torch.allclose(named, expected[[7, 0, 90]], atol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-sampling")
    models.save_model("llama", folder)
    return folder


def test_a_seeded_sample_is_the_same_alone_and_in_a_batch(llama: Path) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 40}
    all_prompts = prompts(16)
    alone = [
        Engine(llama).complete(prompt, 20, seed=i, **sampling)
        for i, prompt in enumerate(all_prompts)
    ]
    for ahead in (False, True):
        engine = Engine(llama, max_num_batched_tokens=48, async_scheduling=ahead)
        requests = [
            engine.add(prompt, 20, seed=i, **sampling) for i, prompt in enumerate(all_prompts)
        ]
        engine.run()
        assert [engine.tokens(request) for request in requests] == alone
    assert len({tuple(tokens) for tokens in alone}) > 8


def test_choices_of_a_seed_differ_and_repeat(llama: Path) -> None:
    prompt = prompts(2)[1]
    runs = []
    for num_blocks in (64, 12):
        engine = Engine(llama, num_blocks=num_blocks)
        request = engine.add(prompt, 30, n=4, seed=11, temperature=1.0)
        engine.run()
        runs.append([engine.tokens(request, choice) for choice in range(4)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 4


STOPS = tuple(range(20, 60))
AHEAD: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7, "presence_penalty": 0.5},
    {"repetition_penalty": 0.8, "temperature": 0.9, "seed": 3, "n": 3},
    {"stop_token_ids": STOPS},
    {"stop_token_ids": STOPS, "min_tokens": 9, "frequency_penalty": 0.4},
    {"logit_bias": ((7, 3.0), (9, 2.0)), "temperature": 1.0, "seed": 5},
    {"allowed_token_ids": tuple(range(60, 90)), "repetition_penalty": 1.5},
    {"logprobs": 3, "prompt_logprobs": 2, "logprob_token_ids": (5, 17, 3)},
    {"logprobs": 2, "n": 2, "temperature": 0.7, "seed": 1, "presence_penalty": 1.0},
    {"max_tokens": 0, "prompt_logprobs": 1},
    {"max_tokens": 1},
    {"bad_words": tuple((token,) for token in range(3, 40)), "repetition_penalty": 1.2},
    {"bad_words": tuple((a, b) for a in range(3, 19) for b in range(3, 19))},
]
"""Kinds of requests whose next step can be launched before the last one's results are known."""
WAITING: list[dict[str, Any]] = [
    {"beam_width": 3, "n": 2, "logprobs": 1, "logprob_token_ids": (4,)},
]
"""Kinds of requests whose tokens the host needs before their next step."""


def summary(engine: Engine, request: Request) -> list[Any]:
    """Return all that a client receives, except times and how outputs were split into steps."""
    received: list[Any] = []
    for choice in range(request.sampling_params.n):
        outputs = engine.outputs[request.request_id, choice]
        final = outputs[-1]
        received += [engine.tokens(request, choice), final.finish_reason, final.stop_reason]
        for entries in (
            (o.logprobs or [] for o in outputs),
            (o.prompt_logprobs or [] for o in outputs),
        ):
            for entry in (entry for group in entries for entry in group if entry is not None):
                received += [entry.token_id, entry.rank, entry.top_token_ids]
                values = [*entry.top_logprobs, *(entry.named_logprobs or ())]
                received += [pytest.approx(value, abs=1e-4) for value in values]
    return received


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kinds", [AHEAD, AHEAD + WAITING], ids=["ahead", "waiting-too"])
def test_every_kind_of_request_gives_the_same_one_step_ahead(
    llama: Path, kinds: list[dict[str, Any]], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests run chunked, preempted and together equal those run one by one without it."""
    fed_back = 0
    forward = Worker.forward

    def counting(worker: Worker, plan: SchedulerOutput) -> StepForward:
        nonlocal fed_back
        fed_back += plan.token_ids.count(UNKNOWN_TOKEN)
        return forward(worker, plan)

    monkeypatch.setattr(Worker, "forward", counting)
    calm = Engine(llama, async_scheduling=False)
    backend = CudaOnCpuBackend(sizes=graph_sizes(12)) if graphs else None
    sizes = {"num_blocks": 20, "max_num_seqs": 12, "max_num_batched_tokens": 40}
    engine = Engine(llama, backend, async_scheduling=True, speculation="off", **sizes)
    wanted = [
        (prompt, {"max_tokens": 12 + 2 * i} | kind)
        for i, (prompt, kind) in enumerate(zip(prompts(len(kinds)), kinds, strict=True))
    ]
    alone = []
    for prompt, fields in wanted:
        alone.append(calm.add(prompt, **fields))
        calm.run()
    assert fed_back == 0
    together = [engine.add(prompt, **fields) for prompt, fields in wanted]
    engine.run()
    for request, other in zip(together, alone, strict=True):
        assert summary(engine, request) == summary(calm, other), request.sampling_params
    assert engine.core.stats().preemptions > 0
    assert fed_back > 100
    assert backend is None or backend.reruns.num_replays > 10


class RoundedLinear(nn.Module):
    """A linear layer whose weight is rounded as `--quantization` says, and whose input is rounded,
    in groups of features, to 127ths of the greatest one."""

    def __init__(self, linear: nn.Linear, quantization: str, group: int = 32) -> None:
        super().__init__()
        self.group = group
        rounded_weight = rounded(linear.weight.detach(), quantization)
        assert isinstance(rounded_weight, GroupedWeight)
        self.weight = rounded_weight.dense()[:, : linear.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        steps = groups.abs().amax(dim=-1, keepdim=True) / 127
        return F.linear((groups / steps).round().mul(steps).flatten(-2), self.weight)


def round_layers(model: PreTrainedModel, quantization: str) -> None:
    """Round all linear layers; the head has 8 bits even if the others have 4."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                kind = "int8" if name == "lm_head" else quantization
                setattr(parent, name, RoundedLinear(child, kind))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_equal_a_model_with_rounded_weights_and_inputs(
    llama: Path, quantization: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    round_layers(model, quantization)
    reference, engine = Reference(model), Engine(llama, quantization=quantization)
    exact = Engine(llama)
    added = prompts(4)
    expected = [reference.complete(prompt, 12) for prompt in added]
    assert [engine.complete(prompt, 12) for prompt in added] == expected
    assert [exact.complete(prompt, 12) for prompt in added] != expected


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_rounded_weights_give_the_same_text_whatever_else_is_in_the_batch(
    name: str, quantization: str, tmp_path: Path
) -> None:
    models.save_model(name, tmp_path)
    engine = Engine(tmp_path, quantization=quantization)
    wanted = [(prompt, 6 + i % 20) for i, prompt in enumerate(prompts(32))]
    together = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted]
    engine.run()
    alone = Engine(tmp_path, quantization=quantization, enable_prefix_caching=False)
    for request, (prompt, max_tokens) in zip(together, wanted, strict=True):
        assert engine.tokens(request) == alone.complete(prompt, max_tokens)
