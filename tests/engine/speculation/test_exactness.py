"""A real engine with and without drafts: tokens, log-probabilities and ends are the same."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.core.engine_core import EngineCore
from quire.engine.lora import AdapterSource
from quire.engine.outputs import SequenceOutput
from quire.engine.reasoning import ReasoningSpec
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Sequence
from quire.engine.speculation.speculator import Speculator

from ..grammar.constrained import (
    DEMO,
    EOS,
    GRAMMARS,
    SCHEMAS,
    VOCAB_SIZE,
    WORD,
    json_spec,
    make_core,
    make_request,
    record,
)
from ..lora_models import save_adapter
from ..models import COMMON, build_model, save_model
from ..sampling_kinds import GRAMMAR_SAMPLING, SAMPLING
from ..worker_driver import make_config
from .drafters import FreeDrafts, RandomDrafter, always


def _requests(seed: int) -> list[Request]:
    """Return requests with every kind of sampling; some prompts begin alike, some are equal."""
    chance = random.Random(seed)
    shared = [chance.randrange(3, 128) for _ in range(40)]
    requests = []
    for index, params in enumerate(SAMPLING):
        own = [chance.randrange(3, 128) for _ in range(chance.randint(1, 30))]
        prompt = shared[: chance.choice([0, 17, 40])] + own * chance.choice([1, 3])
        requests.append(
            Request(
                request_id=f"r{index}",
                prompt_token_ids=tuple(prompt),
                sampling_params=SamplingParams(
                    max_tokens=chance.randint(6, 40), seed=index, **params
                ),
                arrival_time=0.0,
            )
        )
    return requests


Answer = list[SequenceOutput]


def _run(core: EngineCore, requests: list[Request]) -> dict[tuple[str, int], Answer]:
    """Run all requests, which arrive one a step, and return the outputs of each choice."""
    answers: dict[tuple[str, int], Answer] = {}
    waiting = list(requests)
    while waiting or core.has_work:
        if waiting:
            core.add_request(waiting.pop(0))
        for output in core.step().outputs:
            answers.setdefault((output.request_id, output.choice), []).append(output)
        scheduler = core._scheduler
        scheduler.block_manager.check_integrity(scheduler.running)
    stats = core.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return answers


def _content(answer: Answer) -> tuple[Any, ...]:
    """Return what an answer says, whatever steps brought it."""
    last = answer[-1]
    return (
        [token for output in answer for token in output.token_ids],
        [entry for output in answer for entry in output.logprobs or ()],
        [output.prompt_logprobs for output in answer if output.prompt_logprobs],
        (last.finish_reason, last.stop_reason, last.error),
    )


def _compare(
    cores: tuple[EngineCore, EngineCore], requests: list[Request], right: float, seed: int
) -> None:
    plain, drafted = cores
    expected = {key: _content(answer) for key, answer in _run(plain, requests).items()}

    def answers(sequence: Sequence) -> list[int]:
        tokens: list[int] = expected[sequence.request.request_id, sequence.choice][0]
        return tokens

    drafting = drafted._scheduler._drafting
    assert drafting is not None
    drafting.speculator = always(RandomDrafter(answers, right, seed, 128))
    found = {key: _content(answer) for key, answer in _run(drafted, requests).items()}
    assert found == expected
    counts = drafting.speculator.counts
    assert counts.num_drafts > 0
    if right == 1.0:
        assert counts.accepted_tokens > 0.5 * counts.draft_tokens


def _cores(folder: Path, **fields: Any) -> tuple[EngineCore, EngineCore]:
    configs = [
        make_config(folder, **fields, speculation=speculation) for speculation in ("off", "ngram")
    ]
    plain, drafted = (EngineCore(config, Worker(config)) for config in configs)
    return plain, drafted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return path


@pytest.fixture(scope="module")
def grammar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("constrained")
    sizes = COMMON | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None}
    build_model(LlamaConfig(**sizes | {"max_position_embeddings": 512})).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_blocks": 16, "max_num_seqs": 6},
        {"max_num_batched_tokens": 9},
        {"async_scheduling": True},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_every_kind_of_sampling_is_the_same(folder: Path, fields: dict[str, Any]) -> None:
    """In small pools, under small budgets, one step ahead, and in 8 and 4 bits."""
    options = {
        "num_blocks": 80,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        **fields,
    }
    cores = _cores(folder, **options)
    for seed, right in enumerate((0.0, 0.7, 1.0)):
        _compare(cores, _requests(seed), right, seed)


@pytest.mark.parametrize("right", [0.3, 1.0])
def test_grammars_are_the_same(grammar_folder: Path, right: float) -> None:
    """Drafts that a grammar forbids, that it allows, and that run past its end."""
    specs = [spec for spec, _ in GRAMMARS.values()] + [json_spec(one) for one in SCHEMAS]
    requests = [
        replace(
            make_request(f"g{index}", spec, **GRAMMAR_SAMPLING[index % len(GRAMMAR_SAMPLING)]),
            arrival_time=float(index),
        )
        for index, spec in enumerate(specs)
    ]
    plain = make_core(grammar_folder, speculation="off")
    drafted = make_core(grammar_folder, speculation="ngram")
    _compare((plain, drafted), requests, right, 3)


def test_a_grammar_drafts_what_it_forces(grammar_folder: Path) -> None:
    """The keys of a schema are proposed before the model has sampled them."""
    schema = record(first_name=WORD, family_name=WORD, date_of_birth={"type": "null"})
    requests = [make_request("r", json_spec(schema), temperature=1.0)]
    plain = make_core(grammar_folder, speculation="off")
    drafted = make_core(grammar_folder, speculation="ngram")
    expected = {key: _content(answer) for key, answer in _run(plain, requests).items()}
    drafting = drafted._scheduler._drafting
    assert drafting is not None
    speculator = drafting.speculator
    (grammar,) = [one for one in speculator._drafters if one.name == "grammar"]
    drafting.speculator = Speculator([grammar], max_draft=15, max_samples=64, cost=FreeDrafts())
    found = {key: _content(answer) for key, answer in _run(drafted, requests).items()}
    assert found == expected
    counts = drafting.speculator.counts
    assert counts.accepted_tokens >= 5


def test_auto_drafts_only_where_results_are_exact(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder)
    assert EngineCore(config, Worker(config))._scheduler._drafting is not None
    save_model("gemma2", tmp_path)  # runs through transformers' code
    config = make_config(tmp_path)
    assert EngineCore(config, Worker(config))._scheduler._drafting is None
    config = make_config(tmp_path, speculation="ngram")
    assert EngineCore(config, Worker(config))._scheduler._drafting is not None


@pytest.mark.parametrize("right", [0.5, 1.0])
def test_budgets_of_reasoning_are_the_same(folder: Path, right: float) -> None:
    """Drafts within the reasoning, up to its end, and in the answer after it. The mark that closes
    it is two tokens, of which the model may sample any by itself."""
    spec = ReasoningSpec(
        opening=b"<",
        closings=(b"/>",),
        pieces={5: b"<", 6: b"/", 7: b">"},
        begins_inside=True,
        budget=9,
        end=(6, 7),
        after_end=(20, 21, 22),
    )
    budgets = (0, 1, 2, 9, 20, 500)
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "logit_bias": ((6, 4.0), (7, 5.0))},
        {"temperature": 1.0, "bad_words": ((7,), (11, 12)), "n": 2},
    ]
    requests = [
        replace(
            _requests(4)[0],
            request_id=f"b{budget}-{index}",
            sampling_params=SamplingParams(max_tokens=30, seed=budget, ignore_eos=True, **params),
            reasoning=replace(spec, budget=budget),
        )
        for budget in budgets
        for index, params in enumerate(sampling)
    ]
    for ahead in (False, True):
        _compare(_cores(folder, num_blocks=80, async_scheduling=ahead), requests, right, 5)


def test_adapters_are_the_same(tmp_path: Path) -> None:
    """Rows with LoRA adapters, and rows without, share steps with drafts."""
    base = save_model("llama", tmp_path / "base")
    sources = []
    for seed, name in enumerate(("a", "b")):
        save_adapter(base, tmp_path / name, seed=seed, r=4, target_modules="all-linear")
        sources.append(AdapterSource(name, str(tmp_path / name)))
    requests = [
        replace(request, adapter=(None, "a", "b")[index % 3])
        for index, request in enumerate(_requests(6))
    ]
    cores = _cores(
        tmp_path / "base",
        num_blocks=80,
        max_model_len=256,
        enable_lora=True,
        lora=tuple(sources),
        max_loras=2,
    )
    _compare(cores, requests, 0.7, 6)
