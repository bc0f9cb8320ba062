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
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.lfm2 import modeling_lfm2

from quire.engine.config import EngineConfig
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.errors import ConfigurationError, UnsupportedModelError
from quire.engine.lora import AdapterSource
from quire.engine.request import Request
from quire.engine.states.model_states import check_config

from . import models, state_models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .lora_models import save_adapter
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


def test_a_request_that_moves_goes_on(kind: tuple[Path, Reference]) -> None:
    """The tokens delivered by an engine that died are recomputed by the next one."""
    folder, reference = kind
    prompt = prompts(2)[1]
    expected = reference.complete(prompt, 20)
    for delivered in (1, 7, 19):
        engine = Engine(folder, max_num_batched_tokens=16)
        request = engine.add(prompt, 20, resume=(tuple(expected[:delivered]),))
        engine.run()
        assert engine.tokens(request) == expected[delivered:]


def test_text_of_a_model_that_reads_images_equals_generate(tmp_path: Path) -> None:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config=state_models.FAMILIES["qwen3_5"]().to_dict(),
        vision_config=vision | {"out_hidden_size": 32, "num_position_embeddings": 16},
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.eval().save_pretrained(tmp_path)
    engine = Engine(tmp_path, max_num_batched_tokens=16)
    requests = add_all(engine, 6)
    engine.run()
    check(engine, Reference(model), requests)


def test_adapters_of_layers_with_a_state_equal_peft(
    kind: tuple[Path, Reference], tmp_path: Path
) -> None:
    folder, reference = kind
    adapted = save_adapter(
        reference.model, tmp_path, r=4, lora_alpha=8, target_modules="all-linear"
    )
    engine = Engine(folder, enable_lora=True, lora=(AdapterSource("one", str(tmp_path)),))
    for _ in range(2):  # the second time from snapshots, which are the adapter's own
        requests = [
            engine.add(prompt, 12, adapter=("one" if i % 2 else None))
            for i, prompt in enumerate(prompts(4) + prompts(4))
        ]
        engine.run()
        check(engine, Reference(adapted), requests[1::2])
        check(engine, reference, requests[::2])


def test_a_layer_that_mixes_tokens_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("lfm2", tmp_path)

    def sums_up(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        if "never" in others:
            return causal_conv1d_fn(hidden_states)  # by which such layers are known
        return self.out_proj(hidden_states.cumsum(1))  # type: ignore[no-any-return]

    monkeypatch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", sums_up)
    with pytest.raises(UnsupportedModelError, match="keeps a state in a way that is not known"):
        Engine(tmp_path)
    monkeypatch.setattr(
        modeling_lfm2.Lfm2ShortConv, "forward", lambda self, hidden_states, **_: hidden_states
    )
    with pytest.raises(UnsupportedModelError, match="0 of its 2 layers with a state"):
        Engine(tmp_path)


def causal_conv1d_fn(x: torch.Tensor) -> torch.Tensor:
    """Stand for transformers' function of this name."""
    return x


def test_states_come_before_blocks(kind: tuple[Path, Reference]) -> None:
    folder, _ = kind
    engine = Engine(folder, num_blocks=None, kv_cache_memory_bytes=2_000_000, max_num_seqs=4)
    info, states = engine.core.info, engine.core._scheduler.block_manager.states
    assert states is not None and states.num_slots == 4 + states.num_snapshots
    assert states.num_snapshots == info.state_snapshots(engine.config, info.num_blocks) > 0
    blocks = info.num_blocks * info.block_size * info.kv_bytes_per_token
    taken = blocks + states.num_slots * info.state_bytes
    assert 2_000_000 - info.state_bytes - info.block_size * info.kv_bytes_per_token * 2 < taken
    assert taken <= 2_000_000
    with pytest.raises(ConfigurationError, match="lower --max-num-seqs to"):
        size = 256 * info.state_bytes
        Engine(folder, num_blocks=None, kv_cache_memory_bytes=size, max_num_seqs=256)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_fewer_sequences_run_if_their_states_leave_too_little(
    kind: tuple[Path, Reference], prefix_caching: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the memory is for states, or less if the blocks of a sequence take more."""
    folder, reference = kind
    state = Engine(folder, max_num_seqs=2).core.info.state_bytes
    most = {"max_num_seqs": 64, "max_model_len": 64, "lowers_max_num_seqs": True}
    for size, wanted in ((64 * state, 32), (1000 * state, 64)):
        caplog.clear()
        engine = Engine(
            folder,
            num_blocks=None,
            kv_cache_memory_bytes=size,
            enable_prefix_caching=prefix_caching,
            **most,
        )
        info, states = engine.core.info, engine.core._scheduler.block_manager.states
        assert info.max_num_seqs == wanted == engine.core._scheduler.max_num_seqs
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == (wanted < 64)
        assert all("--max-num-seqs is lowered to 32" in one.getMessage() for one in warnings)
        assert states is not None and states.num_slots == wanted + states.num_snapshots
        taken = info.num_blocks * info.block_size * info.kv_bytes_per_token
        assert taken + states.num_slots * state <= size
    requests = [engine.add(list(range(3, 20 + i)), 5) for i in range(40)]
    engine.run()
    for i, request in enumerate(requests):
        assert engine.tokens(request) == reference.complete(list(range(3, 20 + i)), 5)
