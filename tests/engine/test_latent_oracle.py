"""Compare models whose heads share a latent with Hugging Face, in fp32, token for token.

transformers makes keys and values of all heads; the engine keeps the latents, and multiplies what
makes those into the queries and outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v32 import DeepseekV32Config

from quire.engine.config import EngineConfig
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.errors import StartupError, UnsupportedModelError
from quire.engine.layers.latent_heads import LatentHeads
from quire.engine.model.outline import outline
from quire.engine.parallel.ranks import ALONE
from quire.engine.runner.worker import Worker
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import Speculator

from . import latent_models, models, test_beam_oracle
from .checkpoints import quantized_files
from .checkpoints.test_quantized_checkpoint import PlainBackend
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .speculation.drafters import FreeDrafts
from .test_beam_oracle import MAX_TOKENS
from .test_oracle import (
    Engine,
    Reference,
    prompts,
    prompts_with_a_stem,
    round_layers,
    shared_by_tiles,
)
from .worker_driver import load, make_config

WIDTH = 48
"""Numbers of a token and layer in the cache: a latent of 32, and 16 that are rotated."""
SMALL: dict[str, Any] = {"num_blocks": 14, "max_num_batched_tokens": 24}
"""Prompts are chunked, and sequences preempted."""
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 14, "max_num_batched_tokens": 64},
    "preempted-uncached": {"num_blocks": 14, "enable_prefix_caching": False},
    "preempted-ahead": {"async_scheduling": True, "num_blocks": 14, "max_num_batched_tokens": 64},
    "blocks-of-64": {"block_size": 64, "num_blocks": 64, "max_num_batched_tokens": 40},
    "drafts": {"speculation": "ngram"},
    "threads": {"num_threads": 2, "max_num_batched_tokens": 40},
}


@pytest.fixture(scope="module", params=list(latent_models.FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    folder, model = tmp_path_factory.mktemp(request.param), latent_models.build(request.param)
    model.save_pretrained(folder)
    yield folder, Reference(model)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder, model = tmp_path_factory.mktemp("glm4_moe_lite"), latent_models.build("glm4_moe_lite")
    model.save_pretrained(folder)
    return folder, Reference(model)


def make_engine(folder: Path, **config: Any) -> Engine:
    """Start an engine in whose cache nothing is a number."""
    engine = Engine(folder, **config)
    cache = engine.worker._runner._kv_cache
    assert cache.shape[1:2] + cache.shape[3:4] + cache.shape[5:] == (1, 1, WIDTH)
    cache.fill_(torch.nan)
    return engine


def check(engine: Engine, reference: Reference, count: int) -> None:
    """Run mixed requests at once, then the same ones again with every prefix cached."""
    wanted = [(prompt, 6 + i % 20) for i, prompt in enumerate(prompts(count))]
    for _ in range(2):
        requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted]
        engine.run()
        for request, (prompt, max_tokens) in zip(requests, wanted, strict=True):
            assert engine.tokens(request) == reference.complete(prompt, max_tokens)
    assert (engine.core.stats().prefix_hits > 0) == engine.config.enable_prefix_caching


def test_greedy_tokens_equal_generate(family: tuple[Path, Reference]) -> None:
    folder, reference = family
    engine = make_engine(folder, **SMALL)
    check(engine, reference, 12)
    assert engine.core.stats().preemptions > 0


@pytest.mark.parametrize("mode", MODES)
def test_other_schedules_equal_generate(glm: tuple[Path, Reference], mode: str) -> None:
    folder, reference = glm
    engine = make_engine(folder, **MODES[mode])
    check(engine, reference, 32)
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    assert stats.accepted_tokens > 0 or mode != "drafts"


def test_greedy_forks_equal_generate(family: tuple[Path, Reference]) -> None:
    folder, reference = family
    engine = make_engine(folder, num_blocks=12, async_scheduling=True)  # forks are preempted
    prompt = prompts(2, longest=60)[1]
    request = engine.add(prompt, 40, n=4)
    engine.run()
    for choice in range(4):
        assert engine.tokens(request, choice) == reference.complete(prompt, 40)
    stats = engine.core.stats()
    assert stats.blocks_copied > 0 and stats.preemptions > 0


def test_beams_equal_generate(glm: tuple[Path, Reference]) -> None:
    folder, reference = glm
    searches = test_beam_oracle.Reference(reference.model)
    engine = make_engine(folder)
    wanted = list(zip(prompts(2), test_beam_oracle.CASES, strict=False))
    requests = []
    for prompt, case in wanted:
        fields = {**case, "stop_token_ids": searches.stops, "ignore_eos": False}
        requests.append(engine.add(prompt, MAX_TOKENS, n=case["beam_width"], logprobs=0, **fields))
    engine.run()
    for request, (prompt, case) in zip(requests, wanted, strict=True):
        found = test_beam_oracle.found(engine, request)
        expected = searches.search(prompt, **case, stop_token_ids=searches.stops)
        test_beam_oracle.assert_equal(found, expected)
    assert engine.core.stats().blocks_copied > 0


def test_a_draft_model_with_latents_equals_generate(glm: tuple[Path, Reference]) -> None:
    folder, reference = glm
    engine = Engine(folder, speculative_model=str(folder))
    drafting = engine.core._scheduler._drafting
    assert drafting is not None
    drafting.speculator = Speculator(
        [], max_draft=7, max_samples=64, cost=FreeDrafts(), model=ModelDrafter()
    )
    check(engine, reference, 8)
    stats = engine.core.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 0


@pytest.mark.parametrize("num_threads", [1, 2])
def test_reading_a_shared_prefix_once_equals_generate(
    glm: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    folder, reference = glm
    shared, wanted = shared_by_tiles(monkeypatch), prompts_with_a_stem()
    engine = make_engine(folder, num_threads=num_threads)
    requests = [engine.add(prompt, 30) for prompt in wanted]
    engine.run()
    for request, prompt in zip(requests, wanted, strict=True):
        assert engine.tokens(request) == reference.complete(prompt, 30)
    assert max(shared) == 128


def test_logprobs_equal_the_reference(family: tuple[Path, Reference]) -> None:
    """This covers chosen tokens and the prompt, in chunks and after cached prefixes."""
    folder, reference = family
    engine = make_engine(folder, max_num_batched_tokens=16)
    prompt = prompts(4)[3]
    for _ in range(2):  # the second time, the prefix is cached
        request = engine.add(prompt, 8, logprobs=1, prompt_logprobs=1)
        engine.run()
        outputs, tokens = engine.outputs[request.request_id, 0], engine.tokens(request)
        want = models.logprobs(reference.model, prompt + tokens)
        entries = [*outputs[0].prompt_logprobs[1:], *(e for o in outputs for e in o.logprobs)]
        for position, entry in enumerate(entries, start=1):
            token = (prompt + tokens)[position]
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(want[position - 1, token].item(), abs=1e-4)


@pytest.mark.parametrize(
    "config", [{}, {"quantization": "int8"}, {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}]
)
def test_small_numbers_decode_as_the_sequence_alone(
    glm: tuple[Path, Reference], config: dict[str, Any]
) -> None:
    """Latents are rounded token by token, and all products row by row."""
    settings: dict[str, Any] = {"dtype": "auto", "kv_cache_dtype": "float16"} | config
    alone, crowd = Engine(glm[0], **settings), Engine(glm[0], **settings, **SMALL)
    wanted = prompts(12)
    requests = [crowd.add(prompt, 12) for prompt in wanted]
    crowd.run()
    dtype = getattr(torch, settings["kv_cache_dtype"])
    assert crowd.worker._runner._kv_cache.dtype == dtype
    assert crowd.core.info.kv_bytes_per_token == 2 * WIDTH * 2
    for request, prompt in zip(requests, wanted, strict=True):
        assert crowd.tokens(request) == alone.complete(prompt, 12)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_equal_a_model_with_rounded_weights_and_inputs(
    tmp_path: Path, quantization: str
) -> None:
    """All products are rounded but those with latents."""
    model = models.build_model(latent_models.in_groups())
    model.save_pretrained(tmp_path)
    exact = {layer: layer.self_attn.kv_b_proj for layer in model.model.layers}
    round_layers(model, quantization)
    for layer, projection in exact.items():
        layer.self_attn.kv_b_proj = projection
    reference, engine = Reference(model), Engine(tmp_path, quantization=quantization)
    for prompt in prompts(4):
        assert engine.complete(prompt, 12) == reference.complete(prompt, 12)


@pytest.mark.parametrize("form", ["awq", "float8-blocks"])
def test_a_quantised_checkpoint_equals_its_dense_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setitem(quantized_files.MODELS, "latents", latent_models.in_groups)
    names = re.compile(r"_proj(_with_mqa)?\.weight$")
    dense = quantized_files.write_model(tmp_path, "latents", quantized_files.FORMATS[form], names)
    folder, reference = tmp_path / "quantised", Reference(dense)
    engine = Engine(folder, PlainBackend())
    for prompt in prompts(4):
        assert engine.complete(prompt, 12) == reference.complete(prompt, 12)
    # What `quire models` says, and what it takes on the CPU.
    facts = load(folder, dtype="float32").weights
    found = outline(make_config(folder, dtype="float32"), keeps_groups=True)
    assert found.num_parameters == facts.num_parameters
    assert found.weight_bytes == pytest.approx(facts.num_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_cache_dtype": "int8"}, "holds latents"),
        ({"tensor_parallel_size": 2}, "leave --tensor-parallel-size out"),
        ({"pipeline_parallel_size": 2}, "leave --pipeline-parallel-size out"),
        ({"enable_lora": True}, "leave --enable-lora out"),
    ],
)
def test_what_latents_do_not_go_with(
    glm: tuple[Path, Reference], config: dict[str, Any], message: str
) -> None:
    config = {"model": str(glm[0]), "device": "cpu", **config}
    with pytest.raises(StartupError, match=message):
        Worker(EngineConfig(**config), ranks=ALONE).load()


@pytest.mark.parametrize(
    "heads", [LatentHeads(48, 16, 12, 10), LatentHeads(1024, 64, 12, 10), LatentHeads(32, 8, 8, 8)]
)
def test_gpus_refuse_latents_of_other_widths(heads: LatentHeads) -> None:
    CudaOnCpuBackend().check_latents(LatentHeads(512, 64, 192, 256), "Glm4MoeLite")
    with pytest.raises(UnsupportedModelError, match="run on the CPU only"):
        CudaOnCpuBackend().check_latents(heads, "Glm4MoeLite")


@pytest.mark.parametrize("drafts", [False, True])
def test_decode_graphs_equal_generate(glm: tuple[Path, Reference], drafts: bool) -> None:
    folder, reference = glm
    backend = CudaOnCpuBackend(sizes=graph_sizes(6), mixed=[32])
    config: dict[str, Any] = {"speculation": "ngram"} if drafts else {"async_scheduling": True}
    # (Rows padded for drafts read slots that were never written, whose zeros count nothing.)
    engine = Engine(folder, backend, max_num_seqs=6, max_num_batched_tokens=64, **config)
    check(engine, reference, 12)
    assert backend.reruns.num_replays > 15


def test_an_indexer_is_refused(tmp_path: Path) -> None:
    DeepseekV32Config(architectures=["DeepseekV32ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV32.*its indexer chooses"):
        Worker(EngineConfig(model=str(tmp_path), device="cpu", load_format="dummy")).load()


def test_layers_that_make_other_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand = DeepseekV2Attention.expand_kv

    def other(self: Any, latents: torch.Tensor, rotated: torch.Tensor) -> Any:
        keys, values = expand(self, latents, rotated)
        return keys * 1.01, values

    latent_models.build("deepseek_v2").save_pretrained(tmp_path)
    monkeypatch.setattr(DeepseekV2Attention, "expand_kv", other)
    with pytest.raises(UnsupportedModelError, match="other keys and values of its latents"):
        Engine(tmp_path)


def test_layers_of_an_unknown_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent_models.build("deepseek_v2").save_pretrained(tmp_path)
    monkeypatch.delattr(DeepseekV2Attention, "expand_kv")
    with pytest.raises(UnsupportedModelError, match="0 of its 2 layers"):
        Engine(tmp_path)
