"""Layers that keep a state give on several ranks what `generate` gives, and each rank has its part
of the states."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.config import EngineConfig
from quire.engine.devices.choose import choose_backend
from quire.engine.devices.cpu.packing import rounded
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.errors import ConfigurationError, StartupError, UnsupportedModelError
from quire.engine.lora import AdapterSource
from quire.engine.model.loader import load_model
from quire.engine.parallel.cut_layers import SharedNorm
from quire.engine.parallel.state_cuts import cut_states
from quire.engine.states.layers import find_layers

from .. import models, state_models
from ..checkpoints.test_quantized_checkpoint import PlainBackend
from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..lora_models import save_adapter
from ..test_oracle import Engine, Reference, prompts
from ..test_state_oracle import MODES, add_all, check
from ..worker_driver import make_config
from .test_cuts import group_of
from .thread_ranks import Meeting, ParallelEngine, Shared, ThreadGroup

SERVED = ["qwen3_5", "qwen3_5_moe", "qwen3_next", "lfm2", "lfm2_moe", "granite_4_h", "bamba"]
SERVED += ["falcon_h1", "nemotron_h", "olmo_hybrid"]
KINDS = ["qwen3_5", "lfm2", "granite_4_h"]

Made = dict[str, tuple[Path, Reference]]


def config_of(family: str, *, stages: int = 1, **changes: Any) -> Any:
    """Return the configuration of a family, with layers that attend in each of so many stages."""
    made = state_models.FAMILIES[family]()
    if stages > 1 and family == "nemotron_h":
        changes["layers_block_type"] = [*made.layers_block_type[:3], "full_attention", "mlp"]
    elif stages > 1 and family != "falcon_h1":
        state = "conv" if family.startswith("lfm2") else "linear_attention"
        changes["layer_types"] = [state, "full_attention", "full_attention", state][: 2 * stages]
        changes["num_hidden_layers"] = 2 * stages
    return type(made)(**{**made.to_dict(), **changes})


def make(folder: Path, config: Any) -> tuple[Path, Reference]:
    model = models.build_model(config)
    model.save_pretrained(folder)
    return folder, Reference(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Families whose states ranks share."""
    return {family: make(tmp_path_factory.mktemp(family), config_of(family)) for family in SERVED}


def run(engine: Engine, reference: Reference, count: int = 6) -> None:
    """Run requests in chunks, then the same ones again from their snapshots."""
    for _ in range(2):
        requests = add_all(engine, count)
        engine.run()
        check(engine, reference, requests)


@pytest.mark.parametrize("family", SERVED)
def test_every_family_gives_the_same(whole: Made, family: str) -> None:
    folder, reference = whole[family]
    with ParallelEngine(folder, tensor_parallel_size=2, max_num_batched_tokens=40) as engine:
        run(engine, reference)
        assert engine.core.stats().prefix_hits > 0
        plans = engine.ranks[0].plans
        assert any(plan.num_state_saves for plan in plans)
        assert any(plan.state_copies for plan in plans)
        # Each has its part of the states, which are together those of one rank, and no more.
        stores = [one._runner._states.step for one in (engine.worker, engine.followers[1])]
        sizes = [one.convolution[:, 0].nbytes + one.recurrent[:, 0].nbytes for one in stores]
        assert sizes == [engine.core.info.state_bytes // 2] * 2


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "olmo_hybrid", "granite_4_h"])
def test_four_ranks_share_two_heads_of_keys(whole: Made, family: str) -> None:
    folder, reference = whole[family]
    with ParallelEngine(folder, tensor_parallel_size=4) as engine:
        run(engine, reference)
        state = engine.worker._model.spec.state
        heads = 2 if family == "granite_4_h" else 1
        assert state is not None and (state.heads, state.key_heads) == (heads, 1)


@pytest.mark.parametrize("family", ["granite_4_h", "falcon_h1"])
def test_ranks_share_the_only_group_of_mamba(tmp_path: Path, family: str) -> None:
    """As the published models have it: B, C and the norm are then over all channels."""
    changes = {"mamba_rms_norm": True} if family == "falcon_h1" else {}
    made = make(tmp_path, config_of(family, mamba_n_groups=1, **changes))
    with ParallelEngine(made[0], tensor_parallel_size=2) as engine:
        run(engine, made[1])
        state = engine.worker._model.spec.state
        assert state is not None and (state.heads, state.key_heads) == (4, 1)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*((family, "preempted-ahead") for family in KINDS), ("lfm2", "preempted-uncached")],
)
def test_every_way_to_run_gives_the_same(whole: Made, family: str, mode: str) -> None:
    folder, reference = whole[family]
    config = {"max_num_batched_tokens": 96} | MODES[mode]
    with ParallelEngine(folder, tensor_parallel_size=2, **config) as engine:
        run(engine, reference, 10)
        assert engine.core.stats().preemptions > 0


@pytest.mark.parametrize("family", KINDS)
def test_choices_and_the_code_for_gpus_give_the_same(whole: Made, family: str) -> None:
    folder, reference = whole[family]

    def backend() -> CudaOnCpuBackend:
        return CudaOnCpuBackend(sizes=graph_sizes(8), mixed=[64])

    config: dict[str, Any] = {"async_scheduling": True, "max_num_seqs": 8, "num_blocks": 24}
    with ParallelEngine(folder, backend, tensor_parallel_size=2, **config) as engine:
        forked = engine.add(prompts(2, longest=60)[1], 30, n=3)
        requests = [forked, *add_all(engine, 4)]
        engine.run()
        check(engine, reference, requests)
        assert engine.worker._runner.num_graphs
        assert any(plan.num_fed_back for plan in engine.ranks[0].plans)


@pytest.mark.parametrize(
    ("family", "size"),
    [*((family, 1) for family in KINDS), ("falcon_h1", 1), ("nemotron_h", 1), ("qwen3_5", 2)],
)
def test_stages_give_the_same(tmp_path: Path, family: str, size: int) -> None:
    made = make(tmp_path, config_of(family, stages=2))
    shape = {"tensor_parallel_size": size, "pipeline_parallel_size": 2}
    with ParallelEngine(made[0], **shape, num_blocks=40, max_num_batched_tokens=40) as engine:
        run(engine, made[1])
        assert engine.core.stats().prefix_hits > 0


def test_a_stage_may_have_no_layer_with_a_state(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "full_attention"]
    for order in (kinds, kinds[::-1]):
        changes = {"layer_types": order, "num_hidden_layers": 4}
        folder, reference = make(tmp_path / order[0], config_of("qwen3_5", **changes))
        with ParallelEngine(folder, pipeline_parallel_size=2) as engine:
            run(engine, reference)
            assert engine.core.stats().prefix_hits > 0


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_adapters_of_layers_with_a_state_equal_peft(
    tmp_path: Path, family: str, shape: tuple[int, int]
) -> None:
    size, stages = shape
    folder, reference = make(tmp_path / "base", config_of(family, stages=stages))
    adapted = save_adapter(
        reference.model, tmp_path / "one", r=4, lora_alpha=8, target_modules="all-linear"
    )
    lora = (AdapterSource("one", str(tmp_path / "one")),)
    config = {"tensor_parallel_size": size, "pipeline_parallel_size": stages, "lora": lora}
    with ParallelEngine(folder, enable_lora=True, **config) as engine:
        requests = [
            engine.add(prompt, 12, adapter=("one" if index % 2 else None))
            for index, prompt in enumerate(prompts(4) + prompts(4))
        ]
        engine.run()
        check(engine, Reference(adapted), requests[1::2])
        check(engine, reference, requests[::2])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rounded_model_is_that_of_its_rounded_weights(tmp_path: Path, kind: str) -> None:
    """In float products, token for token: what is rounded are whole rows, before they are cut."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "linear_value_head_dim": 32}
    folder, reference = make(tmp_path, config_of("qwen3_5", **sizes))
    for _, linear in reference.model.model.named_modules():
        if type(linear) is nn.Linear:
            grouped = rounded(linear.weight.detach(), kind)
            assert isinstance(grouped, GroupedWeight)
            linear.weight = nn.Parameter(grouped.dense())
    with ParallelEngine(folder, PlainBackend, tensor_parallel_size=2, quantization=kind) as engine:
        for prompt in prompts(3, longest=40):
            assert engine.complete(prompt, 8) == reference.complete(prompt, 8)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "lfm2", "granite_4_h"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_cuts_of_all_ranks_are_the_whole(family: str, size: int) -> None:
    """Every number of a layer is on some rank, and on several only if they share a head of keys."""
    model = models.build_model(state_models.FAMILIES[family]())
    layers = find_layers(model.model)
    name, layer = next(iter(layers.items()))
    counts = {one: torch.zeros_like(value) for one, value in layer.named_parameters()}
    for number, (_, value) in enumerate(layer.named_parameters()):
        value.data = torch.arange(value.numel()).view(value.shape) + 1e6 * number
    for rank in range(size):
        part = copy.deepcopy(layer)
        cut_states({name: part}, group_of(rank, size), family)
        for one, value in part.named_parameters():
            one = one.replace("_proj.linear.", "_proj.")
            first = float(layer.get_parameter(one).detach().min())
            places = (value.detach() - first).long().flatten()
            counts[one].view(-1)[places] += 1
    for one, count in counts.items():
        if one == "norm.weight" and family != "granite_4_h":  # over the numbers of one head
            assert (count == size).all()
        else:
            assert count.min() == 1 and count.max() in (1, max(1, size // 2)), one


@pytest.mark.parametrize(("groups", "before"), [(1, True), (1, False), (4, False)])
def test_a_shared_norm_is_the_norm_of_all_channels(groups: int, before: bool) -> None:
    x, gate = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    norm = FalconH1RMSNormGated(16, n_groups=groups, norm_before_gate=before)
    norm.weight.data = torch.randn(16)
    shared = Shared()
    meeting = Meeting(shared, 2)
    found: dict[int, torch.Tensor] = {}

    def run_rank(rank: int) -> None:
        own = slice(8 * rank, 8 * rank + 8)
        with shared.baton:
            part = SharedNorm(norm, own, groups, ThreadGroup(meeting, rank, 2))
            found[rank] = part(x[..., own], gate[..., own])

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([found[0], found[1]], dim=-1), norm(x, gate))


LOPSIDED = ["linear_attention"] * 3 + ["full_attention"] * 4 + ["linear_attention"]
"""Of two stages, one has most of the states, the other one most of the layers with K and V."""


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2)])
def test_states_come_before_blocks_on_each_rank(tmp_path: Path, size: int, stages: int) -> None:
    folder, _ = make(tmp_path, config_of("qwen3_5", layer_types=LOPSIDED, num_hidden_layers=8))
    shape = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
    given: dict[str, Any] = {"num_blocks": None, "kv_cache_memory_bytes": 2_000_000}
    with ParallelEngine(folder, **shape, **given, max_num_seqs=4) as engine:
        taken = memory_taken(engine)
        assert max(taken) <= 2_000_000 < max(taken) * 1.1


def memory_taken(engine: ParallelEngine) -> list[int]:
    """Return the bytes of each rank's states and blocks."""
    states = engine.core._scheduler.block_manager.states
    assert states is not None and states.num_snapshots > 0
    taken = []
    for worker in (engine.worker, *engine.followers.values()):
        store = worker._runner._states
        assert store is not None and store.step.convolution.shape[1] == states.num_slots
        tensors = (store.step.convolution, store.step.recurrent, worker._runner.kv_cache)
        taken.append(sum(tensor.nbytes for tensor in tensors))
    return taken


def test_the_rank_with_the_most_states_says_how_many_sequences_run(tmp_path: Path) -> None:
    folder, reference = make(
        tmp_path, config_of("qwen3_5", layer_types=LOPSIDED, num_hidden_layers=8)
    )
    given: dict[str, Any] = {"num_blocks": None, "kv_cache_memory_bytes": 400_000}
    given |= {"max_num_seqs": 64, "max_model_len": 128, "max_num_batched_tokens": 64}
    with ParallelEngine(
        folder, pipeline_parallel_size=2, lowers_max_num_seqs=True, **given
    ) as engine:
        assert 0 < engine.core.info.max_num_seqs < 64
        assert max(memory_taken(engine)) <= 400_000
        run(engine, reference)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], type[StartupError], str]] = [
    (
        "qwen3_5",
        {"linear_num_key_heads": 3, "linear_num_value_heads": 6},
        {"tensor_parallel_size": 2},
        ConfigurationError,
        "2 does not divide the 6 heads and 3 heads of keys .* choose from 1, 3",
    ),
    (
        "lfm2",
        {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 4},
        {"tensor_parallel_size": 8},
        ConfigurationError,
        "8 does not divide the 36 channels",
    ),
    (
        "qwen3_5",
        {},
        {"pipeline_parallel_size": 2},
        ConfigurationError,
        "2 leaves a stage of .* without a layer that attends: choose from 1$",
    ),
]


@pytest.mark.parametrize(("family", "changes", "flags", "error", "message"), REFUSED)
def test_what_ranks_cannot_share_is_refused_before_weights_are_read(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    flags: dict[str, Any],
    error: type[StartupError],
    message: str,
) -> None:
    config_of(family, **changes).save_pretrained(tmp_path)  # there are no weights to read
    config: EngineConfig = make_config(tmp_path, **flags)
    with pytest.raises(error, match=message):
        load_model(config, choose_backend(config))


def test_a_layer_with_more_than_its_kind_has_is_refused() -> None:
    model = models.build_model(state_models.FAMILIES["lfm2"]())
    layers = find_layers(model.model)
    first = next(iter(layers.values()))
    first.add_module("gate_proj", nn.Linear(32, 32))
    with pytest.raises(UnsupportedModelError, match="other layers than .*: gate_proj"):
        cut_states(layers, group_of(0, 2), "Odd")
    with pytest.raises(UnsupportedModelError, match="is a Linear, whose state ranks cannot share"):
        cut_states({"layer": nn.Linear(2, 2)}, group_of(0, 2), "Odd")
