"""The cuts of all ranks are the whole weight, and what cannot be cut is refused by its name."""

from __future__ import annotations

import contextlib
import copy
import queue
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.engine.devices.choose import choose_backend
from quire.engine.errors import ConfigurationError, StartupError, UnsupportedModelError
from quire.engine.model import loader
from quire.engine.model.loader import load_model
from quire.engine.parallel.cut_layers import (
    RowLinear,
    VocabLinear,
    cut_body,
    cut_head,
    cut_scales,
    kv_part,
)
from quire.engine.parallel.stages import cut_stage, layers_of
from quire.engine.parallel.tensor_plan import Heads, body_plan, find_cuts

from .. import models
from ..worker_driver import make_config
from .thread_ranks import Meeting, ParallelEngine, Shared, ThreadGroup, ThreadRing, make_ranks


def group_of(rank: int, size: int) -> ThreadGroup:
    return ThreadGroup(Meeting(Shared(), size), rank, size)


@settings(max_examples=25, deadline=None)
@given(
    tensor=st.sampled_from([2, 3, 4]),
    heads_each=st.integers(1, 3),
    kv=st.sampled_from([1, 2, 4, 12]),
    head_dim=st.sampled_from([2, 6]),
    vocab=st.integers(5, 17),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_cuts_of_all_ranks_are_the_whole(
    tensor: int, heads_each: int, kv: int, head_dim: int, vocab: int, bias: bool, seed: int
) -> None:
    heads = Heads(12 * heads_each, kv)
    if not (kv % tensor == 0 or tensor % kv == 0):
        return
    whole = models.build_model(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=heads.query,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=heads.query,
            num_key_value_heads=kv,
            head_dim=head_dim,
            attention_bias=bias,
            mlp_bias=bias,
            bos_token_id=1,
            eos_token_id=2,
        ),
        seed,
    )
    parts: list[Any] = []
    for rank in range(tensor):
        part = copy.deepcopy(whole)
        group = group_of(rank, tensor)
        cut_body(part.base_model, body_plan(part.config), heads, group, "Llama")
        cut_head(part, group)
        parts.append(part)

    def of(name: str) -> list[torch.Tensor]:
        return [dict(part.named_parameters())[name] for part in parts]

    kinds = ["weight", "bias"] if bias else ["weight"]
    layer, weights = "model.layers.0.", dict(whole.named_parameters())
    for name, kind in product(("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"), kinds):
        assert torch.equal(torch.cat(of(f"{layer}{name}.{kind}")), weights[f"{layer}{name}.{kind}"])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        columns = torch.cat(of(f"{layer}{name}.linear.weight"), dim=1)
        assert torch.equal(columns, weights[f"{layer}{name}.weight"])
        if bias:
            assert all(
                torch.equal(one, weights[f"{layer}{name}.bias"])
                for one in of(f"{layer}{name}.bias")
            )
    for name, kind in product(("self_attn.k_proj", "self_attn.v_proj"), kinds):
        found, wanted = of(f"{layer}{name}.{kind}"), weights[f"{layer}{name}.{kind}"]
        copies = max(1, tensor // kv)
        assert torch.equal(torch.cat(found[::copies]), wanted)
        assert all(torch.equal(found[i], found[i - i % copies]) for i in range(tensor))
    head = torch.cat([part.lm_head.weight for part in parts])
    assert torch.equal(head[:vocab], whole.lm_head.weight) and not head[vocab:].any()
    assert type(parts[0].lm_head) is VocabLinear
    assert type(parts[0].model.layers[0].mlp.down_proj) is RowLinear


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_ranks_queries_have_their_own_kv_heads(kv: int, size: int) -> None:
    query = 16
    for rank in range(size):
        mine = range(rank * query // size, (rank + 1) * query // size)
        rows = kv_part(kv * 3, kv, group_of(rank, size))
        assert {head * kv // query for head in mine} == set(range(rows.start // 3, rows.stop // 3))


@given(st.integers(1, 9), st.integers(0, 40))
def test_stages_share_all_layers(size: int, more: int) -> None:
    ranges = [
        layers_of(ThreadRing(Shared(), [None] * size, stage), size + more) for stage in range(size)
    ]  # type: ignore[list-item]
    assert [layer for one in ranges for layer in one] == list(range(size + more))
    lengths = [len(one) for one in ranges]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1


def doubled(forward: Any, **arguments: Any) -> Any:
    output = forward(**arguments)
    output.last_hidden_state *= 2
    return output


def test_a_body_that_does_more_than_its_layers_has_no_stages() -> None:
    ring = ThreadRing(Shared(), [queue.Queue(), queue.Queue()], 1)
    configs = {family: models.FAMILIES[family]() for family in ("llama", "gemma2", "gemma3")}
    configs["granite"] = GraniteConfig(**models.COMMON, embedding_multiplier=2.0)
    configs["odd"] = models.FAMILIES["llama"]()
    for family, config in configs.items():
        model, refused = models.build_model(config), family == "odd"
        if refused:
            model.base_model.forward = partial(doubled, model.base_model.forward)
        error = pytest.raises(UnsupportedModelError, match="before its first layer")
        with error if refused else contextlib.nullcontext():
            cut_stage(model, model.base_model, ring, family)


def test_scales_of_the_kv_cache_are_cut_like_it() -> None:
    scales = torch.arange(24.0).view(3, 2, 4)
    for ranks in make_ranks(2, 3):
        stage, part = divmod(ranks.rank, 2)
        expected = scales[stage, :, 2 * part : 2 * part + 2]
        found = cut_scales(scales, layers_of(ranks.ring, 3), ranks.group)
        assert torch.equal(found[0], expected)


def test_experts_are_cut_in_their_middle() -> None:
    whole = models.build_model(models.FAMILIES["mixtral"]())
    layer = "model.layers.0.mlp.experts."
    weights = dict(whole.named_parameters())
    size, parts = 64 // 2, []
    for rank in range(2):
        part = copy.deepcopy(whole)
        cut_body(part.base_model, body_plan(part.config), Heads(4, 2), group_of(rank, 2), "Mixtral")
        parts.append(dict(part.named_parameters()))
    gates = torch.cat([part[f"{layer}gate_up_proj"][:, :size] for part in parts], dim=1)
    ups = torch.cat([part[f"{layer}gate_up_proj"][:, size:] for part in parts], dim=1)
    assert torch.equal(torch.cat([gates, ups], dim=1), weights[f"{layer}gate_up_proj"])
    downs = torch.cat([part[f"{layer}down_proj"] for part in parts], dim=2)
    assert torch.equal(downs, weights[f"{layer}down_proj"])


REFUSED: list[tuple[str, dict[str, Any], type[StartupError], str]] = [
    (
        "llama",
        {"tensor_parallel_size": 3},
        ConfigurationError,
        "does not divide the 4 heads and 2 KV.* 1, 2, 4",
    ),
    ("llama", {"tensor_parallel_size": 8}, ConfigurationError, "choose from 1, 2, 4"),
    ("llama", {"pipeline_parallel_size": 3}, ConfigurationError, "only 2 layers"),
    (
        "phi3",
        {"tensor_parallel_size": 2},
        UnsupportedModelError,
        "qkv_proj by 'colwise_gather_output'",
    ),
    ("gpt_oss", {"tensor_parallel_size": 2}, UnsupportedModelError, "no plan"),
]


@pytest.mark.parametrize(("family", "flags", "error", "message"), REFUSED)
def test_what_ranks_cannot_run_is_refused_before_weights_are_read(
    tmp_path: Path, family: str, flags: dict[str, Any], error: type[StartupError], message: str
) -> None:
    models.FAMILIES[family]().save_pretrained(tmp_path)  # there are no weights to read
    config = make_config(tmp_path, **flags)
    with pytest.raises(error, match=message):
        load_model(config, choose_backend(config))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nnodes": 2}, "cannot share 1 ranks"),
        ({"tensor_parallel_size": 4, "nnodes": 3}, "cannot share 4 ranks"),
        ({"tensor_parallel_size": 4, "nnodes": 2, "node_rank": 2}, "not below --nnodes 2"),
        ({"tensor_parallel_size": 512, "pipeline_parallel_size": 4}, "more than 1024"),
    ],
)
def test_ranks_and_hosts_have_to_match(flags: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EngineConfig(model="m", **flags)  # type: ignore[arg-type]


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


class Layer(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attn = attention


@pytest.mark.parametrize(
    ("names", "plan", "message"),
    [
        (("q_proj",), {"attn.q_proj": "colwise"}, "only one side of attn"),
        (
            ("qkv", "o_proj"),
            {"attn.qkv": "colwise", "attn.o_proj": "rowwise"},
            "cut in qkv, not in",
        ),
        (("q_proj",), {"attn.*_proj_nowhere": "colwise"}, "cuts no layer"),
    ],
)
def test_plans_that_do_not_add_up_are_refused(
    names: tuple[str, ...], plan: dict[str, str], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_cuts(Layer(Attention(*names)), plan, "Odd")


class NormedMLP(nn.Module):
    """An MLP with a norm over its intermediate numbers, of which no rank has all."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.gate_proj(x).sigmoid() * self.up_proj(x)
        normed: torch.Tensor = self.down_proj(inner / inner.norm(dim=-1, keepdim=True))
        return normed


def test_layers_that_give_something_else_in_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save_model("llama", tmp_path)
    read = loader._load

    def load(*arguments: Any) -> Any:
        model, *others = read(*arguments)
        for layer in model.model.layers:
            layer.mlp = NormedMLP(layer.mlp)
        return model, *others

    monkeypatch.setattr(loader, "_load", load)
    refused = pytest.raises(UnsupportedModelError, match="do not give the same in parts")
    with refused, ParallelEngine(tmp_path, tensor_parallel_size=2):
        pass
