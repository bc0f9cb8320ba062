"""LoRA adapters on several ranks give what PEFT gives, whenever they were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire.engine.adapters.adapter import Adapter, LinearShape, LoraWeight
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.lora import AdapterSource
from quire.engine.parallel.adapter_cuts import AdapterCuts, LinearCut, pack_weight, unpack_weight
from quire.engine.parallel.step_plan import make_plan
from quire.engine.step import AdapterLoad

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..random_steps import make_output
from ..test_lora_oracle import NUM_TOKENS, Family, add_mixed, make_family
from ..test_oracle import Engine, prompts
from .thread_ranks import ParallelEngine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("llama", tmp_path_factory.mktemp("llama"))


def engine_of(
    family: Family, size: int, make_backend: Any = None, stages: int = 1, **config: Any
) -> ParallelEngine:
    config = {"lora": family.sources(), "max_loras": 4, "pipeline_parallel_size": stages} | config
    base = family.folder / "base"
    return ParallelEngine(base, make_backend, enable_lora=True, tensor_parallel_size=size, **config)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_mixed_batch_equals_peft(name: str, tmp_path: Path) -> None:
    """With biases, and in a body that is not flat."""
    family = make_family(name, tmp_path)
    with engine_of(family, 2, max_num_batched_tokens=16, max_loras=2) as engine:
        requests = add_mixed(engine)
        engine.run()
        family.check(engine, requests)
        assert any(plan.adapter_loads for plan in engine.ranks[0].plans)


def test_four_ranks_that_share_two_kv_heads_equal_peft(llama: Family) -> None:
    with engine_of(llama, 4, num_blocks=14, async_scheduling=True) as engine:
        requests = add_mixed(engine)
        engine.run()
        llama.check(engine, requests)
        assert engine.core.stats().preemptions


@pytest.mark.parametrize("sizes", [(), tuple(graph_sizes(8))])
def test_the_code_for_gpus_equals_peft(llama: Family, sizes: tuple[int, ...]) -> None:
    def backend() -> CudaOnCpuBackend:
        return CudaOnCpuBackend(sizes=sizes)

    with engine_of(llama, 2, backend, max_num_seqs=8, async_scheduling=True) as engine:
        requests = add_mixed(engine)
        engine.run()
        llama.check(engine, requests)
        assert bool(engine.worker._runner.num_graphs) == bool(sizes)


@pytest.mark.parametrize(("name", "size"), [("llama", 1), ("gemma2", 2)])
def test_stages_equal_peft(name: str, size: int, tmp_path: Path) -> None:
    """Each has the matrices of its layers; the fewest tokens a step, and two slots for four."""
    family = make_family(name, tmp_path)
    with engine_of(family, size, stages=2, max_num_batched_tokens=16, max_loras=2) as engine:
        requests = add_mixed(engine)
        engine.run()
        family.check(engine, requests)


def test_stages_of_the_code_for_gpus_equal_peft(llama: Family) -> None:
    config: dict[str, Any] = {"max_num_seqs": 8, "async_scheduling": True}
    with engine_of(llama, 1, CudaOnCpuBackend, stages=2, **config) as engine:
        requests = add_mixed(engine)
        engine.run()
        llama.check(engine, requests)


def test_a_rounded_base_has_adapters(llama: Family) -> None:
    """What an adapter changes is what it changes on one rank, of the same rounded weights."""

    def change(engine: Engine) -> torch.Tensor:
        found = []
        for adapter in (None, "stable"):
            request = engine.add(prompts(2)[1], 1, adapter=adapter, prompt_logprobs=0)
            engine.run()
            (output,) = engine.outputs[request.request_id, 0]
            entries = output.prompt_logprobs or []
            found.append(torch.tensor([one.logprob for one in entries if one is not None]))
        return found[1] - found[0]

    wanted = change(llama.engine(quantization="int8"))
    with engine_of(llama, 2, quantization="int8") as engine:
        error = (change(engine) - wanted).norm() / wanted.norm()
    assert error < 0.1


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2)])
def test_adapters_come_and_go_on_all_ranks(llama: Family, size: int, stages: int) -> None:
    prompt = prompts(1)[0]
    with engine_of(
        llama, size, stages=stages, lora=llama.sources("wide"), max_lora_rank=64
    ) as engine:
        adapters = engine.core.adapters

        def load(name: str, folder: str, *, replace: bool = False) -> None:
            source = AdapterSource(name, str(llama.folder / folder))
            loading = adapters.begin(source, replace=replace)
            loading.read.result()
            adapters.finish(loading)

        def held() -> list[set[int]]:
            engine.complete(prompt, 1)  # a step, after which all orders have been carried out
            workers = [engine.worker, *engine.followers.values()]
            return [set(worker._adapters._adapters) for worker in workers]

        assert engine.complete(prompt, NUM_TOKENS, adapter="wide") == llama.references[
            "wide"
        ].complete(prompt, NUM_TOKENS)
        load("late", "mixed")
        request = engine.add(prompt, NUM_TOKENS, adapter="late")
        engine.step()
        load("late", "stable", replace=True)
        newer = engine.add(prompt, NUM_TOKENS, adapter="late")
        engine.run()
        for one, reference in ((request, "mixed"), (newer, "stable")):
            wanted = llama.references[reference].complete(prompt, NUM_TOKENS)
            assert engine.tokens(one) == wanted
        assert held() == [{0, 2}] * 2
        adapters.unload("late")
        assert held() == [{0}] * 2
        # What all ranks hold is together the adapter, once.
        cuts = [one._adapters._cuts for one in (engine.worker, engine.followers[1])]
        parts = [
            worker._adapters._adapters[0].weights for worker in (engine.worker, engine.followers[1])
        ]
        whole = engine.worker._adapters.read(llama.sources("wide")[0]).weights
        if stages > 1:
            held_twice = [
                cut.whole_name(own) for cut, part in zip(cuts, parts, strict=True) for own in part
            ]
            assert sorted(held_twice) == sorted(whole)
            return
        for name, weight in whole.items():
            a, b = ([getattr(part[name], half) for part in parts] for half in "ab")
            if name.endswith(("o_proj", "down_proj")):
                assert torch.equal(torch.cat(a, dim=1), weight.a) and torch.equal(b[1], weight.b)
            else:
                assert torch.equal(torch.cat(b), weight.b) and torch.equal(a[1], weight.a)


def test_a_layer_crosses_as_numbers() -> None:
    weight = LoraWeight(torch.rand(3, 8), torch.rand(10, 8)[:, :3])
    again = unpack_weight(*pack_weight(weight))
    assert all(torch.equal(one, other) for one, other in zip(again, weight, strict=True))
    cuts = AdapterCuts({"q": LinearCut(rows=slice(5, 10)), "o": LinearCut(columns=slice(0, 4))}, {})
    part = cuts.part(Adapter({"q": weight, "o": weight, "router": weight})).weights
    assert torch.equal(part["q"].b, weight.b[5:]) and part["q"].a is weight.a
    assert torch.equal(part["o"].a, weight.a[:, :4]) and part["o"].b is weight.b
    assert part["router"] is weight


def test_a_stage_has_the_matrices_of_its_layers() -> None:
    weight = LoraWeight(torch.rand(3, 8), torch.rand(8, 3))
    shapes = {f"model.layers.{layer}.mlp.up": LinearShape(8, 8) for layer in range(5)}
    shapes |= {"model.first": LinearShape(8, 8)}
    cuts = AdapterCuts({"model.layers.0.mlp.up": LinearCut(rows=torch.tensor([1, 7]))}, shapes)
    cuts = cuts._replace(prefix="model", stage=range(2, 4))
    part = cuts.part(Adapter(dict.fromkeys(shapes, weight))).weights
    assert set(part) == {"model.layers.0.mlp.up", "model.layers.1.mlp.up", "model.first"}
    assert torch.equal(part["model.layers.0.mlp.up"].b, weight.b[[1, 7]])
    assert part["model.layers.1.mlp.up"] is weight is part["model.first"]
    assert cuts.whole_name("model.layers.1.mlp.up") == "model.layers.3.mlp.up"


def test_a_plan_of_loads_alone_has_no_rows() -> None:
    output = make_output([])._replace(adapter_loads=[AdapterLoad(1, 7)])
    assert output.begins_with_copies and not make_output([]).begins_with_copies
    plan = make_plan(output, None, np.empty(0, np.int64), [], extra_logits=[], num_fed_back=0)
    assert (plan.num_seqs, plan.has_adapters, plan.adapter_loads) == (0, False, [(1, 7)])
