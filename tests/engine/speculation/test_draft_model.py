"""A real engine with a draft model: the same answers, and a cache that holds for both models."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import ConfigurationError, StartupError
from quire.engine.lora import AdapterSource
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import SpeculationCounts, Speculator

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..grammar.constrained import GRAMMARS, SCHEMAS, json_spec, make_request
from ..lora_models import save_adapter
from ..models import COMMON, build_model, save_model
from ..worker_driver import make_config
from .drafters import FreeDrafts
from .test_exactness import _content, _requests, _run, grammar_folder

__all__ = ["grammar_folder"]

OPTIONS = {"num_blocks": 80, "max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model, and of others with its vocabulary."""
    root = tmp_path_factory.mktemp("models")
    for name, family, seed in (("served", "llama", 0), ("other", "qwen3", 7)):
        save_model(family, root / name, seed)
    return {name: root / name for name in ("served", "other")}


def make_core(
    folder: Path, draft: Path | None, backend: CudaOnCpuBackend | None = None, **fields: Any
) -> EngineCore:
    """Return an engine; with a draft model, every draft is one of that model's."""
    drafted = {"speculation": "off"} if draft is None else {"speculative_model": str(draft)}
    config = make_config(folder, **OPTIONS | drafted | fields)
    core = EngineCore(config, Worker(config, backend))
    drafting = core._scheduler._drafting
    if drafting is not None:
        drafting.speculator = Speculator(
            [], max_draft=7, max_samples=64, cost=FreeDrafts(), model=ModelDrafter()
        )
    return core


def counts_of(core: EngineCore) -> SpeculationCounts:
    drafting = core._scheduler._drafting
    assert drafting is not None
    return drafting.speculator.counts


@pytest.mark.parametrize(
    ("draft", "fields"),
    [
        ("served", {"num_blocks": 16, "max_num_seqs": 6}),
        ("served", {"async_scheduling": True}),
        ("served", {"quantization": "int4"}),
        ("other", {}),
        ("other", {"max_num_batched_tokens": 9, "async_scheduling": True}),
        ("other", {"quantization": "int8"}),
    ],
    ids=str,
)
def test_answers_are_those_without_it(
    folders: dict[str, Path], draft: str, fields: dict[str, Any]
) -> None:
    """Under every kind of sampling, in small pools, under small budgets, one step ahead, in 8 and 4
    bits: whether the draft model is right or random."""
    requests = _requests(1)
    plain = make_core(folders["served"], None, **fields)
    expected = {key: _content(answer) for key, answer in _run(plain, requests).items()}
    drafted = make_core(folders["served"], folders[draft], **fields)
    found = {key: _content(answer) for key, answer in _run(drafted, requests).items()}
    assert found == expected
    counts = counts_of(drafted)
    assert counts.num_drafts > 10
    if draft == "served":
        assert counts.accepted_tokens > 0.8 * counts.draft_tokens  # not all know the penalties


def _stateless(seed: int) -> list[Request]:
    """Return requests whose draws depend on nothing but the logits."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 9, "logit_bias": ((5, 4.0),), "n": 3},
        {"temperature": 1.0, "min_tokens": 8, "stop_token_ids": (17, 23)},
    ]
    return [
        replace(
            request,
            request_id=f"s{seed}-{index}",
            sampling_params=SamplingParams(max_tokens=30, seed=index, **sampling[index % 4]),
        )
        for index, request in enumerate(_requests(seed))
    ]


def _beams(seed: int) -> Request:
    params = SamplingParams(max_tokens=20, temperature=0.0, beam_width=3, n=3)
    return replace(_requests(seed)[2], request_id=f"beams{seed}", sampling_params=params)


def _scored(seed: int) -> Request:
    params = SamplingParams(max_tokens=5, temperature=0.0, prompt_logprobs=0)
    return replace(_requests(seed)[3], request_id=f"scored{seed}", sampling_params=params)


def _abort_halfway(core: EngineCore, requests: list[Request]) -> None:
    for request in requests:
        core.add_request(request)
    for step in range(14):
        core.step()
        if step % 2:
            core.abort_request(requests[step // 2].request_id)
    for request in requests:
        core.abort_request(request.request_id)
    while core.has_work:
        core.step()
    core._scheduler.block_manager.check_integrity([])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_blocks": 17, "max_num_seqs": 6},
        {"max_num_batched_tokens": 11, "block_size": 32},
    ],
    ids=str,
)
def test_the_served_model_as_its_own_draft_is_always_right(
    folders: dict[str, Path], fields: dict[str, Any]
) -> None:
    """One wrong guess would show a slot whose K and V the draft model has not computed: after a
    preemption, a prefix hit, a copy, a fork, a chunk, or a draft that was cut short."""
    core = make_core(folders["served"], folders["served"], **fields)
    for seed in range(3):  # the later ones find prefixes of the first
        _run(core, [*_stateless(seed % 2), _beams(seed), _scored(seed)])
        _abort_halfway(core, _stateless(seed % 2))
    counts = counts_of(core)
    assert counts.draft_tokens > 100
    assert counts.accepted_tokens == counts.draft_tokens
    stats = core.stats()
    assert stats.prefix_hits > 0 and stats.blocks_copied > 0
    if "num_blocks" in fields:
        assert stats.preemptions > 0


@pytest.mark.parametrize("sizes", [(), (1, 2, 4, 8)], ids=["eager", "graphs"])
def test_on_the_cuda_path(folders: dict[str, Path], sizes: tuple[int, ...]) -> None:
    """Both models' passes of one token a row are replayed, if there are graphs."""
    requests = _stateless(0)[:5]
    for index, request in enumerate(requests):
        params = replace(request.sampling_params, temperature=0.0)
        requests[index] = replace(request, sampling_params=params)
    answers = []
    for draft in (None, folders["served"], folders["other"]):
        backend = CudaOnCpuBackend(sizes=sizes)
        core = make_core(folders["served"], draft, backend=backend)
        answers.append({key: _content(answer) for key, answer in _run(core, requests).items()})
        if draft is not None:
            assert counts_of(core).num_drafts > 10
            assert (backend.reruns.num_replays > 30) == bool(sizes)
        if draft == folders["served"]:
            assert counts_of(core).accepted_tokens == counts_of(core).draft_tokens
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("wide", ["served", "other"])
def test_graphs_of_models_whose_heads_share_keys_otherwise(
    folders: dict[str, Path], tmp_path: Path, wide: str
) -> None:
    """Rows are padded as the served model's kernel takes them, and the draft model's follows."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 4}
    build_model(LlamaConfig(**COMMON | heads), 3).save_pretrained(tmp_path)
    pair = {**folders, wide: tmp_path}
    requests = [
        replace(request, sampling_params=SamplingParams(max_tokens=30, temperature=0.0))
        for request in _requests(2)[:4]
    ]
    backend = CudaOnCpuBackend(sizes=(1, 2, 4, 8))
    plain = make_core(pair["served"], None, CudaOnCpuBackend())
    drafted = make_core(pair["served"], pair["other"], backend)
    answers = [
        {key: _content(answer) for key, answer in _run(core, requests).items()}
        for core in (plain, drafted)
    ]
    assert answers[0] == answers[1]
    assert counts_of(drafted).num_drafts > 10


@pytest.mark.parametrize("wider", ["served", "other"])
def test_vocabularies_may_differ_in_padding(
    folders: dict[str, Path], tmp_path: Path, wider: str
) -> None:
    """The logits of one model are wider than its tokenizer, and prompts hold ids of the padding."""
    padded = tmp_path / "padded"
    build_model(LlamaConfig(**COMMON | {"vocab_size": 136})).save_pretrained(padded)
    pair = {**folders, wider: padded}
    tokens = Tokenizer(WordLevel({f"t{index}": index for index in range(120)}, unk_token="t0"))
    for folder in pair.values():
        PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    requests = _requests(1)
    if wider == "served":
        prompts = [(*one.prompt_token_ids, 129, 135) for one in requests]
        pairs = zip(requests, prompts, strict=True)
        requests = [replace(one, prompt_token_ids=prompt) for one, prompt in pairs]
    answers = [
        {key: _content(answer) for key, answer in _run(core, requests).items()}
        for core in (make_core(pair["served"], None), make_core(pair["served"], pair["other"]))
    ]
    assert answers[0] == answers[1]


def test_the_speculator_weighs_the_passes(folders: dict[str, Path]) -> None:
    """With measured costs, a model as large as the served one stops drafting."""
    core = make_core(folders["served"], folders["served"])
    drafting = core._scheduler._drafting
    assert drafting is not None
    speculator = Speculator([], max_draft=7, max_samples=64, model=ModelDrafter())
    drafting.speculator = speculator
    for _ in range(40):
        speculator.cost.observe(1, 1e-3)
        speculator.cost.observe_passes(4, 1, 4e-3)  # a pass takes as long as a step
    _run(core, _stateless(0)[:1])
    assert speculator.counts.num_drafts <= 3


def _compare(served: EngineCore, drafted: EngineCore, requests: list[Request]) -> None:
    answers = [
        {key: _content(answer) for key, answer in _run(core, requests).items()}
        for core in (served, drafted)
    ]
    assert answers[0] == answers[1]
    assert counts_of(drafted).accepted_tokens > 10


@pytest.mark.parametrize("ahead", [False, True])
def test_grammars_read_what_the_model_drafts(grammar_folder: Path, ahead: bool) -> None:
    """The guesses break the grammar, since the draft model does not know it, or follow it."""
    specs = [spec for spec, _ in GRAMMARS.values()] + [json_spec(one) for one in SCHEMAS]
    sampling: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "n": 2}]
    requests = [
        make_request(f"g{index}", spec, **sampling[index % 2]) for index, spec in enumerate(specs)
    ]
    options = {"max_model_len": 512, "async_scheduling": ahead, "num_blocks": 200}
    served = make_core(grammar_folder, None, **options)
    _compare(served, make_core(grammar_folder, grammar_folder, **options), requests)


def test_rows_with_adapters_are_drafted_without_them(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    save_adapter(base, tmp_path / "a", seed=1, r=4, target_modules="all-linear")
    fields = {"enable_lora": True, "lora": (AdapterSource("a", str(tmp_path / "a")),)}
    requests = [
        replace(request, adapter="a" if index % 2 else None)
        for index, request in enumerate(_requests(6))
    ]
    served = make_core(tmp_path / "base", None, **fields)
    _compare(served, make_core(tmp_path / "base", tmp_path / "base", **fields), requests)


# -- the start -----------------------------------------------------------------------------------


def _refusal(folder: Path, draft: Path | str, **fields: Any) -> str:
    with pytest.raises(StartupError) as caught:
        Worker(make_config(folder, speculative_model=str(draft), **fields)).load()
    message = caught.value.message
    assert "\n" not in message and message.startswith(f"--speculative-model {draft}: ")
    return message.partition(": ")[2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 100}, "its vocabulary has 100 tokens and the model's has 128"),
        ({"eos_token_id": [2, 3]}, r"its end tokens are \[2, 3\] and the model's are \[2\]"),
        (
            {"max_position_embeddings": 64},
            "its context has 64 tokens and the model's has 128: set --max-model-len 64 or less",
        ),
    ],
    ids=["vocabulary", "end tokens", "context"],
)
def test_a_model_that_does_not_fit_is_refused(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    build_model(LlamaConfig(**COMMON | changes)).save_pretrained(tmp_path)
    assert re.fullmatch(expected, _refusal(folders["served"], tmp_path))


def test_another_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    served, draft = tmp_path / "served", tmp_path / "draft"
    for folder, names in ((served, "ab"), (draft, "xb")):
        shutil.copytree(folders["served"], folder)
        vocabulary = {f"{names[index % 2]}{index}": index for index in range(128)}
        tokens = Tokenizer(WordLevel(vocabulary, unk_token=f"{names[0]}0"))
        PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    expected = "its vocabulary is another one: 64 of 128 tokens are the model's"
    assert _refusal(served, draft) == expected
    assert Worker(make_config(served, speculative_model=str(served))).load().draft_weight_bytes > 0


def test_a_folder_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    assert _refusal(folders["served"], "/nowhere/at/all").startswith("there is no folder")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"speculation": "model"}, "--speculation model needs a --speculative-model"),
        ({"speculation": "off", "speculative_model": "x"}, "--speculation off has no draft model"),
        ({"speculation": "ngram", "speculative_model": "x"}, "ngram has no draft model"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        EngineConfig(model="m", **fields)


def test_its_memory_is_counted(folders: dict[str, Path]) -> None:
    """A block takes the memory of both caches, and what is asked for holds both."""
    size = 2**20
    sizes = {}
    for draft in (None, str(folders["other"])):
        config = make_config(
            folders["served"], num_blocks=None, kv_cache_memory_bytes=size, speculative_model=draft
        )
        worker = Worker(config)
        info = worker.load()
        per_block = 16 * (info.kv_bytes_per_token + info.draft_kv_bytes_per_token)
        sizes[draft] = num_blocks = worker.profile()
        assert num_blocks == size // per_block
        assert (info.draft_weight_bytes > 0) == (draft is not None)
    assert sizes[str(folders["other"])] < sizes[None]
