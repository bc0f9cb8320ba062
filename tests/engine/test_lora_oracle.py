"""Compare LoRA adapters with PEFT, in fp32, token for token, whatever shares their steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quire.engine.lora import AdapterSource
from quire.engine.request import Request

from . import models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .harness import make_request
from .lora_models import save_adapter, with_adapter
from .rounding import round_model
from .test_oracle import Engine, Reference, prompts

NUM_TOKENS = 14
ALL = "all-linear"

ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 1, "lora_alpha": 2, "target_modules": r".*\.self_attn\..*_proj"},
    "wide": {"r": 64, "lora_alpha": 16, "target_modules": ALL, "size": 0.08},
    "stable": {"r": 20, "lora_alpha": 10, "use_rslora": True, "target_modules": ALL},
    "mixed": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {r"layers\.0\.mlp\.down_proj": 3, "o_proj": 33},
        "alpha_pattern": {"o_proj": 20, r"layers\.1\..*": 4},
    },
    "upper": {"r": 5, "lora_alpha": 7.5, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "mlp": {"r": 16, "lora_alpha": 32, "target_modules": r"(?!.*self_attn).*\.layers\..*_proj"},
}
"""What differs: ranks over and under a panel, targets, scalings."""

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "granite", "glm4"]
"""All but one are compiled: gate and up are one layer of the model or two, and updates are added as
they are, scaled, or normed."""


class Family(NamedTuple):
    folder: Path
    references: dict[str | None, Reference]

    def sources(self, *names: str) -> tuple[AdapterSource, ...]:
        wanted = names or tuple(ADAPTERS)
        return tuple(AdapterSource(name, str(self.folder / name)) for name in wanted)

    def engine(self, backend: CudaOnCpuBackend | None = None, **config: Any) -> Engine:
        config = {"enable_lora": True, "lora": self.sources()} | config
        return Engine(self.folder / "base", backend, **config)

    def check(self, engine: Engine, requests: list[Request]) -> None:
        for request in requests:
            reference = self.references[request.adapter]
            expected = reference.complete(list(request.prompt_token_ids), NUM_TOKENS)
            assert engine.tokens(request) == expected, request.adapter


def make_family(name: str, folder: Path) -> Family:
    base: PreTrainedModel = models.save_model(name, folder / "base")
    references: dict[str | None, Reference] = {None: Reference(base)}
    for seed, (adapter, config) in enumerate(ADAPTERS.items()):
        model = save_adapter(base, folder / adapter, seed=seed, **config)
        references[adapter] = Reference(model)
    return Family(folder, references)


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    yield make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("llama", tmp_path_factory.mktemp("llama"))


def add_mixed(engine: Engine) -> list[Request]:
    """Add requests of all adapters, and some of none, whose prompts share prefixes."""
    names = [None, *ADAPTERS]
    return [
        engine.add(prompt, NUM_TOKENS, adapter=names[index % len(names)])
        for index, prompt in enumerate(prompts(2 * len(names), longest=50))
    ]


MODES: dict[str, dict[str, Any]] = {
    "all at once": {"max_loras": len(ADAPTERS)},
    "two slots, chunked": {"max_loras": 2, "max_num_batched_tokens": 16},
    "one ahead, preempted": {"max_loras": 3, "num_blocks": 14, "async_scheduling": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_equals_peft(family: Family, mode: str) -> None:
    engine = family.engine(**MODES[mode])
    requests = add_mixed(engine)
    engine.run()
    family.check(engine, requests)
    preempted = engine.core.stats().preemptions > 0
    assert preempted == ("preempted" in mode)


@pytest.mark.parametrize("sizes", [(), (1, 2, 4, 8, 16)])
def test_the_cuda_path_equals_peft(family: Family, sizes: tuple[int, ...]) -> None:
    """With graphs, decodes with and without adapters replay graphs of their own."""
    backend = CudaOnCpuBackend(sizes=sizes)
    engine = family.engine(backend, max_loras=4)
    requests = add_mixed(engine)
    engine.run()
    alone = engine.add(list(requests[0].prompt_token_ids), NUM_TOKENS)
    engine.run()
    family.check(engine, [*requests, alone])
    assert bool(backend.reruns.num_replays) == bool(sizes)


@pytest.mark.parametrize("adapter", [None, "stable", "mixed"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_rounded_model_has_adapters_in_float32(
    llama: Family, quantization: str, adapter: str | None
) -> None:
    """PEFT over a base whose weights and inputs are rounded in the same way, and adapters that see
    inputs as they are. What is left is inputs that a float's last bit rounds otherwise, if there
    are any: a rounding is off by 1/254 of its group's greatest, and one in thousands of them."""
    base = AutoModelForCausalLM.from_pretrained(llama.folder / "base", attn_implementation="eager")
    round_model(base, quantization)
    expected = base if adapter is None else with_adapter(base, llama.folder / adapter)
    engine = llama.engine(quantization=quantization, max_logprobs=models.VOCAB_SIZE)
    for prompt in prompts(3):
        request = engine.add(prompt, 1, adapter=adapter, logprobs=models.VOCAB_SIZE)
        engine.run()
        (entry,) = engine.outputs[request.request_id, 0][0].logprobs or []
        found = torch.empty(models.VOCAB_SIZE)
        found[entry.top_token_ids] = torch.tensor(entry.top_logprobs)
        with torch.no_grad():
            logits = expected.eval()(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        exact = logits.log_softmax(dim=-1)
        assert (found - exact).norm() < 0.002 * (exact - exact.mean()).norm()


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", None), ("llama", "int8"), ("llama", "int4"), ("gemma2", None)],
)
def test_a_row_does_not_depend_on_its_company(
    name: str, quantization: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To the bit: rows without an adapter beside rows with one, and rows with one beside others,
    in chunks of any size."""
    family = make_family(name, tmp_path_factory.mktemp(name))

    def run(company: int, budget: int) -> list[list[float]]:
        engine = family.engine(
            max_loras=4, max_num_batched_tokens=budget, quantization=quantization
        )
        few = prompts(3, longest=30)
        watched = [
            engine.add(prompt, 6, adapter=adapter, logprobs=3)
            for prompt, adapter in zip(few, (None, "wide", "mixed"), strict=True)
        ]
        names = ["stable", None, "wide", "mlp"]
        for index in range(company):
            engine.add(prompts(9)[index], 9, adapter=names[index % 4])
        engine.run()
        return [
            [
                value
                for output in engine.outputs[request.request_id, 0]
                for entry in output.logprobs or []
                for value in entry.top_logprobs
            ]
            for request in watched
        ]

    run(0, 512)  # a kernel that was compiled just now may round otherwise than one from the disk
    alone = run(0, 512)
    if name == "llama":  # products of transformers' code depend on the number of rows
        assert run(8, 512) == alone and run(8, 16) == alone
    else:
        for have, want in zip(run(8, 512), alone, strict=True):
            torch.testing.assert_close(have, want, atol=1e-4, rtol=0)


def test_a_step_without_adapters_is_the_step_of_an_engine_without_them(llama: Family) -> None:
    """To the bit, log-probabilities included."""
    results = []
    llama.engine()  # see above
    for config in ({}, {"enable_lora": False, "lora": ()}):
        engine = llama.engine(**config)
        request = engine.add(prompts(1)[0], 8, logprobs=5)
        engine.run()
        results.append([output.logprobs for output in engine.outputs[request.request_id, 0]])
    assert results[0] == results[1]


def test_forks_and_beams_keep_their_adapter(llama: Family) -> None:
    engine = llama.engine(max_loras=1)
    prompt = prompts(2)[1]
    forked = engine.add(prompt, NUM_TOKENS, adapter="wide", n=3)
    beams = engine.add(prompt, NUM_TOKENS, adapter="stable", beam_width=1)
    plain = engine.add(prompt, NUM_TOKENS)
    engine.run()
    expected = llama.references["wide"].complete(prompt, NUM_TOKENS)
    assert [engine.tokens(forked, choice) for choice in range(3)] == [expected] * 3
    assert engine.tokens(beams) == llama.references["stable"].complete(prompt, NUM_TOKENS)
    llama.check(engine, [plain])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_the_adapted_model(llama: Family, pooling: str) -> None:
    engine = llama.engine(max_num_batched_tokens=16)
    prompt = prompts(2)[1]
    for name in (None, "wide"):
        request = make_request(prompt, 0, pooling=pooling, adapter=name)
        engine.core.add_request(request)
        engine.run()
        data = engine.outputs[request.request_id, 0][-1].embedding
        assert data is not None
        model = llama.references[name].model
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        expected = states[-1] if pooling == "last" else states.mean(0)
        found = torch.frombuffer(bytearray(data), dtype=torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_prefixes_are_shared_within_a_version_of_an_adapter_only(llama: Family) -> None:
    engine = llama.engine(max_loras=2)
    prompt = prompts(1)[0] * 4
    cached = {}

    def ask(adapter: str | None) -> int:
        request = engine.add(prompt[:70], NUM_TOKENS, adapter=adapter)
        engine.run()
        llama.check(engine, [request])
        return engine.outputs[request.request_id, 0][0].num_cached_tokens or 0

    for adapter in (None, "wide", "mlp", None, "wide", "mlp"):
        cached.setdefault(adapter, []).append(ask(adapter))
    assert cached == {adapter: [0, 69] for adapter in (None, "wide", "mlp")}
    # The same name with other weights: a new version, which finds nothing.
    adapters = engine.core.adapters
    loading = adapters.begin(AdapterSource("wide", str(llama.folder / "mlp")), replace=True)
    loading.read.result()
    adapters.finish(loading)
    request = engine.add(prompt[:70], NUM_TOKENS, adapter="wide")
    engine.run()
    assert engine.tokens(request) == llama.references["mlp"].complete(prompt[:70], NUM_TOKENS)
    assert engine.outputs[request.request_id, 0][0].num_cached_tokens == 0


def test_a_version_that_is_replaced_or_unloaded_finishes_its_requests(llama: Family) -> None:
    engine = llama.engine(lora=llama.sources("wide", "mlp"), max_loras=1)
    prompt = prompts(1)[0]
    old = [engine.add(prompt, NUM_TOKENS, adapter=name) for name in ("wide", "mlp")]
    engine.step()
    adapters = engine.core.adapters
    loading = adapters.begin(AdapterSource("wide", str(llama.folder / "stable")), replace=True)
    loading.read.result()
    adapters.finish(loading)
    adapters.unload("mlp")
    new = engine.add(prompt, NUM_TOKENS, adapter="wide")
    with pytest.raises(Exception, match="mlp"):
        engine.add(prompt, NUM_TOKENS, adapter="mlp")
    engine.run()
    llama.check(engine, old)
    assert engine.tokens(new) == llama.references["stable"].complete(prompt, NUM_TOKENS)
    assert len(engine.worker._adapters._adapters) == 1  # the others are forgotten
