"""Compare models whose layers keep a state with Hugging Face, in fp32, token for token.

Whatever is chunked, preempted, copied from a snapshot, forked or batched, the tokens are those of
`generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quire.engine.config import EngineConfig
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.errors import ConfigurationError
from quire.engine.request import Request
from quire.engine.states.model_states import check_config

from . import models, state_models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .test_oracle import Engine, Reference, prompts


def save_model(family: str, folder: Path) -> PreTrainedModel:
    model = models.build_model(state_models.FAMILIES[family]())
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(state_models.FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp(request.param)
    yield folder, Reference(save_model(request.param, folder))


def add_all(engine: Engine, count: int) -> list[Request]:
    return [engine.add(prompt, 6 + i % 15) for i, prompt in enumerate(prompts(count))]


def check(engine: Engine, reference: Reference, requests: list[Request]) -> None:
    engine.core._scheduler.block_manager.check_integrity([])
    for request in requests:
        prompt, length = list(request.prompt_token_ids), request.sampling_params.max_tokens
        for choice in range(request.sampling_params.n):
            assert engine.tokens(request, choice) == reference.complete(prompt, length)


MODES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 14, "max_num_batched_tokens": 64},
    "preempted-uncached": {"num_blocks": 14, "enable_prefix_caching": False},
    "preempted-ahead": {"async_scheduling": True, "num_blocks": 14, "max_num_batched_tokens": 64},
}


def test_greedy_tokens_equal_generate(family: tuple[Path, Reference]) -> None:
    """Mixed requests run at once, in chunks, then the same ones again from their snapshots."""
    folder, reference = family
    engine = Engine(folder, max_num_batched_tokens=40)
    for _ in range(2):
        requests = add_all(engine, 10)
        engine.run()
        check(engine, reference, requests)
    assert engine.core.stats().prefix_hits > 0


@pytest.fixture(scope="module", params=["qwen3_5", "lfm2", "granite_4_h"])
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    """One family for each kind of state."""
    folder = tmp_path_factory.mktemp(request.param)
    yield folder, Reference(save_model(request.param, folder))


@pytest.mark.parametrize("mode", MODES)
def test_32_at_once_equal_generate(kind: tuple[Path, Reference], mode: str) -> None:
    """The same requests come twice, the second time from their snapshots."""
    folder, reference = kind
    engine = Engine(folder, **{"max_num_batched_tokens": 96} | MODES[mode])
    for _ in range(2):
        requests = add_all(engine, 32)
        engine.run()
        check(engine, reference, requests)
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    states = engine.core._scheduler.block_manager.states
    assert states is not None
    if not engine.config.enable_prefix_caching:
        assert stats.prefix_hits == states.num_cached == 0
    elif "num_blocks" not in MODES[mode]:
        assert stats.prefix_hits > 0 and states.num_cached > 0


def test_forks_equal_generate(kind: tuple[Path, Reference]) -> None:
    folder, reference = kind
    for num_blocks, ahead in ((64, False), (12, True)):  # 12: forks are preempted
        engine = Engine(folder, num_blocks=num_blocks, async_scheduling=ahead)
        request = engine.add(prompts(2, longest=60)[1], 40, n=4)
        engine.run()
        check(engine, reference, [request])


def test_the_cuda_path_equals_generate(kind: tuple[Path, Reference]) -> None:
    """Decodes and mixed steps are padded, and replayed one step ahead with static tensors."""
    folder, reference = kind
    backend = CudaOnCpuBackend(sizes=graph_sizes(11), mixed=[64, 128])
    engine = Engine(folder, backend, async_scheduling=True, max_num_seqs=11)
    requests = add_all(engine, 8)
    engine.run()
    check(engine, reference, requests)
    assert backend.reruns.num_replays > 5


def test_beams_equal_generate(kind: tuple[Path, Reference]) -> None:
    folder, reference = kind
    for num_blocks in (64, 12):
        engine = Engine(folder, num_blocks=num_blocks)
        wanted = prompts(4, longest=50)
        requests = [
            engine.add(prompt, 12, beam_width=3, n=2, length_penalty=1.0) for prompt in wanted
        ]
        engine.run()
        for prompt, request in zip(wanted, requests, strict=True):
            with torch.no_grad():
                expected = reference.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=12,
                    min_new_tokens=12,
                    do_sample=False,
                    num_beams=3,
                    num_return_sequences=2,
                    eos_token_id=None,
                )
            for choice in range(2):
                tokens = expected[choice, len(prompt) :].tolist()
                assert engine.tokens(request, choice) == tokens


def test_a_conversation_goes_on_from_a_snapshot(kind: tuple[Path, Reference]) -> None:
    """The second turn computes little more than what is new, and a third prompt that parts from
    the others within them finds the snapshot that was taken where the second parted."""
    folder, reference = kind
    engine = Engine(folder)
    first = prompts(1, longest=90)[0] + list(range(3, 90))
    answer = engine.complete(first, 9)
    second = first + answer + [5, 6, 7]
    request = engine.add(second, 9)
    engine.run()
    check(engine, reference, [request])
    cached = engine.outputs[request.request_id, 0][0].num_cached_tokens
    assert cached is not None and len(first) - 16 <= cached < len(second)
    hits = []
    for tail in (100, 101, 102):
        other = engine.add([*first[:70], tail, tail], 9)
        engine.run()
        check(engine, reference, [other])
        hits.append(engine.outputs[other.request_id, 0][0].num_cached_tokens)
    assert hits[1] == hits[2] == 64 >= (hits[0] or 0)


def test_tokens_one_at_a_time_equal_generate(kind: tuple[Path, Reference]) -> None:
    folder, reference = kind
    engine = Engine(folder, deterministic=True)
    requests = add_all(engine, 6)
    engine.run()
    check(engine, reference, requests)


def test_layers_in_bfloat16_are_proven_and_run(kind: tuple[Path, Reference]) -> None:
    folder, _ = kind
    engine = Engine(folder, dtype="bfloat16")
    requests = add_all(engine, 8)
    engine.run()
    assert all(len(engine.tokens(one)) == one.sampling_params.max_tokens for one in requests)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"speculation": "ngram"}, "--speculation ngram"),
        ({"speculative_model": "another"}, "--speculative-model"),
    ],
)
def test_what_a_state_rules_out_is_refused(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^Some: .*{flag}"):
        check_config(EngineConfig(model="none", **fields), "Some")
