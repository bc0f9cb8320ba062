"""Requests that move at any token: engines die again and again, and nobody can tell.

A table of streams, a scheduler, a worker and a tiny model are the real ones; only the processes
between them are missing. "Death" takes everything that an engine has not delivered yet. Then all
of its requests go on at another engine, or at the same one with nothing in its memory. Tokens,
log-probabilities and ends must be those of a run without deaths, to the bit.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineInfo
from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import InvalidRequestError
from quire.engine.lora import AdapterSource
from quire.engine.outputs import SequenceOutput, Timings
from quire.engine.process import streams
from quire.engine.process.stream import Stream
from quire.engine.process.streams import StreamTable
from quire.engine.reasoning import ReasoningSpec
from quire.engine.request import GrammarSpec, Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

from .grammar.constrained import DEMO, EOS, GRAMMARS, SCHEMAS, VOCAB_SIZE, json_spec, make_request
from .lora_models import save_adapter
from .models import COMMON, build_model, save_model
from .sampling_kinds import GRAMMAR_SAMPLING, SAMPLING
from .worker_driver import make_config

KINDS = (
    *SAMPLING,
    {"temperature": 1.0, "n": 4, "stop_token_ids": tuple(range(3, 20)), "repetition_penalty": 1.1},
    {"temperature": 0.0, "prompt_logprobs": 0, "max_tokens": 1},
    {"temperature": 0.0, "beam_width": 3, "n": 2},
)


def make_requests(seed: int) -> list[Request]:
    """Return requests with every kind of sampling; some prompts begin alike."""
    chance = random.Random(seed)
    shared = [chance.randrange(3, 128) for _ in range(40)]
    requests = []
    for index, params in enumerate(KINDS):
        own = [chance.randrange(3, 128) for _ in range(chance.randint(1, 30))]
        params = {"max_tokens": chance.randint(6, 40), "seed": index, **params}
        requests.append(
            Request(
                request_id=f"r{index}",
                prompt_token_ids=tuple(shared[: chance.choice([0, 17, 40])] + own),
                sampling_params=SamplingParams(**params),
                arrival_time=time.monotonic(),
                prediction=tuple(own[:12]) if index % 4 == 0 and "beam_width" not in params else (),
            )
        )
    pooled = SamplingParams(max_tokens=0)
    tokens = tuple(shared)
    requests.append(
        Request(
            request_id="pooled",
            prompt_token_ids=tokens,
            sampling_params=pooled,
            arrival_time=time.monotonic(),
            pooling="mean",
        )
    )
    return requests


class Mortal:
    """An engine core that a table of streams sends requests to, and that may die."""

    def __init__(self, core: EngineCore, table: StreamTable) -> None:
        self.core = core
        self._table = table
        self._refused: list[tuple[str, InvalidRequestError]] = []
        core.watch_begins(table.begun)

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def add_request(self, request: Request) -> None:
        self.core.add_request(request)

    def abort_request(self, request_id: str, choice: int | None) -> None:
        self.core.abort_request(request_id, choice)

    def step(self) -> None:
        if self.core.has_work:
            self._table.deliver(self.core.step().outputs)
            scheduler = self.core._scheduler
            scheduler.block_manager.check_integrity(scheduler.running)

    def die(self, *, keeps_cache: bool) -> None:
        """Lose everything that is not delivered; live on as an engine that has just started."""
        for sequence in list(self.core._scheduler.requests.unfinished()):
            self.core.abort_request(sequence.request.request_id)
        while self.core.has_work:
            self.core.step()
        if not keeps_cache:
            self.core.reset_prefix_cache()


Answers = dict[tuple[str, int], list[SequenceOutput]]


async def run(
    cores: list[EngineCore], requests: list[Request], deaths: random.Random | None = None
) -> tuple[Answers, int]:
    """Run all requests, which arrive one a step, while engines die; return the outputs of each
    choice and how often a request moved."""
    answers: Answers = {}
    moves = 0
    table = StreamTable(lambda request, began_at: (engines[-1], request))
    engines = [Mortal(core, table) for core in cores]

    async def read(request: Request) -> None:
        async for output in table.generate(request):
            answers.setdefault((output.request_id, output.choice), []).append(output)

    waiting, readers = list(requests), list[asyncio.Task[None]]()
    while waiting or not all(reader.done() for reader in readers):
        if waiting:
            readers.append(asyncio.create_task(read(waiting.pop(0))))
            await asyncio.sleep(0)
        engines[-1].step()
        await asyncio.sleep(0)
        if deaths is not None and deaths.random() < 0.12:
            dead = engines[-1]
            moves += table.num_unfinished(dead)
            engines.insert(0, engines.pop())  # the next engine, if there are several
            if dead is engines[-1]:
                dead.die(keeps_cache=deaths.random() < 0.5)
            table.detach(dead)
            if dead is not engines[-1]:
                dead.die(keeps_cache=True)
    for reader in readers:
        reader.result()
    assert len(table) == 0 and not table._sent
    for engine in engines:
        engine.die(keeps_cache=False)
        stats = engine.core.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.prefix_hits <= stats.prefix_queries
    return answers, moves


def content(outputs: list[SequenceOutput]) -> Any:
    """Return what an answer says, whatever steps brought it; each end comes once."""
    last = outputs[-1]
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert last.timings is not None and last.timings.finished >= 0
    if last.token_ids and last.timings.first_token is not None:
        assert last.timings.first_token <= last.timings.finished + 1e-3
    return (
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs or ()],
        [output.prompt_logprobs for output in outputs if output.prompt_logprobs],
        (last.finish_reason, last.stop_reason, last.error),
        # A mean over the prompt depends in its last bits on how the prompt was cut.
        [round(number, 4) for number in np.frombuffer(last.embedding or b"", "<f4").tolist()],
    )


async def compare(cores: list[EngineCore], requests: list[Request], seeds: range) -> int:
    """Compare runs with deaths to one without; return how many times a request moved."""
    calm, _ = await run(cores[:1], requests)
    expected = {key: content(outputs) for key, outputs in calm.items()}
    total = 0
    for seed in seeds:
        found, moves = await run(cores, requests, random.Random(seed))
        assert {key: content(outputs) for key, outputs in found.items()} == expected
        total += moves
    return total


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DEATHS", 10**6)
    monkeypatch.setattr(streams, "MAX_MOVES", 10**6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return path


def make_core(folder: Path, **fields: Any) -> EngineCore:
    sizes = {"num_blocks": 80, "max_num_batched_tokens": 64, "max_model_len": 256}
    config = make_config(folder, **sizes | fields)
    return EngineCore(config, Worker(config))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_blocks": 16, "max_num_seqs": 6},
        {"max_num_batched_tokens": 9},
        {"async_scheduling": True},
        {"enable_prefix_caching": False},
        {"speculation": "off", "scheduling_policy": "fair"},
    ],
    ids=str,
)
async def test_every_kind_of_sampling_goes_on_exactly(folder: Path, fields: dict[str, Any]) -> None:
    """In small pools, under small budgets, one step ahead, with drafts and without."""
    core = make_core(folder, **fields)
    moves = await compare([core], make_requests(len(str(fields))), range(3))
    print(f"{moves} moves")
    assert moves > 40


async def test_requests_go_to_and_fro_between_two_engines(folder: Path) -> None:
    """The engine that they leave is slow rather than dead, and what it still says is dropped."""
    cores = [make_core(folder), make_core(folder, max_num_batched_tokens=16)]
    assert await compare(cores, make_requests(3), range(4)) > 60


async def test_grammars_and_budgets_of_reasoning_go_on_exactly(tmp_path: Path) -> None:
    sizes = COMMON | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None}
    build_model(LlamaConfig(**sizes | {"max_position_embeddings": 512})).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    specs = [spec for spec, _ in GRAMMARS.values()] + [json_spec(one) for one in SCHEMAS]
    requests = [
        make_request(f"g{index}", spec, **GRAMMAR_SAMPLING[index % len(GRAMMAR_SAMPLING)])
        for index, spec in enumerate(specs)
    ]
    reasoning = ReasoningSpec(
        opening=b"<none>",
        closings=(b"<7><11>",),
        pieces={7: b"<7>", 11: b"<11>"},
        begins_inside=True,
        budget=0,
        end=(7, 11),
        after_end=(20, 21, 22),
    )
    for budget in (1, 5, 25):
        request = make_request(f"b{budget}", None, max_tokens=40, n=2, ignore_eos=True)
        requests.append(replace(request, reasoning=replace(reasoning, budget=budget)))
    request = make_request("both", GrammarSpec("regex", "(.|\n)*"), max_tokens=40)
    requests.append(replace(request, reasoning=replace(reasoning, budget=7)))
    core = make_core(tmp_path, num_blocks=256, max_model_len=512)
    assert await compare([core], requests, range(4)) > 100


async def test_adapters_go_on_exactly(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    sources = []
    for seed, name in enumerate(("a", "b")):
        save_adapter(base, tmp_path / name, seed=seed, r=4, target_modules="all-linear")
        sources.append(AdapterSource(name, str(tmp_path / name)))
    requests = [
        replace(request, adapter=(None, "a", "b")[index % 3])
        for index, request in enumerate(make_requests(6))
        if request.pooling is None
    ]
    core = make_core(
        tmp_path / "base", enable_lora=True, lora=tuple(sources), max_loras=2, num_blocks=120
    )
    versions = [source.version for source in core.info.adapters]
    assert len(set(versions)) == 2 and all(versions)
    assert await compare([core], requests, range(3)) > 50


async def test_only_an_equal_engine_goes_on(folder: Path, tmp_path: Path) -> None:
    """What has delivered something ends with an error at another model; what has not is sent."""
    save_model("qwen3", tmp_path)
    cores = [make_core(folder), make_core(folder, block_size=32), make_core(tmp_path)]
    request = make_requests(0)[0]
    for other, what in ((cores[1], "block_size"), (cores[2], "model")):
        for steps in (0, 3):
            found = await _moved(cores[0], other, request, steps)
            if steps:
                assert found[-1].error is not None and found[-1].error.code == "engine_dead"
                assert what in found[-1].error.message
            else:
                assert found[-1].finish_reason == "length"


async def _moved(
    first: EngineCore, second: EngineCore, request: Request, steps: int
) -> list[SequenceOutput]:
    """Return the outputs of a request that moves after so many steps."""
    table = StreamTable(lambda request, began_at: (engines[-1], request))
    engines = [Mortal(first, table)]
    outputs: list[SequenceOutput] = []

    async def read() -> None:
        outputs.extend([output async for output in table.generate(request)])

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    for _ in range(steps):
        engines[0].step()
    engines.append(Mortal(second, table))
    table.detach(engines[0])
    engines[0].die(keeps_cache=False)
    while not reader.done():
        engines[1].step()
        await asyncio.sleep(0)
    return outputs


def test_delivered_tokens_are_output_and_are_not_charged_again(folder: Path) -> None:
    core = make_core(folder, scheduling_policy="fair", speculation="off")
    plain = replace(make_requests(0)[0], prediction=(), user="a")
    resumed = replace(plain, request_id="again", resume=((5, 6, 7),), user="b")
    for request in (plain, resumed):
        core.add_request(request)
    outputs = [output for _ in _steps(core) for output in core.step().outputs]
    tokens = [token for one in outputs if one.request_id == "again" for token in one.token_ids]
    assert len(tokens) == plain.sampling_params.max_tokens - 3
    accounts = core._scheduler.waiting._accounts  # type: ignore[union-attr]
    cached = {one.num_cached_tokens for one in outputs if one.request_id == "r0"} - {None}
    charged = len(plain.prompt_token_ids) - min(cached)  # type: ignore[type-var]
    assert accounts["a"].service - accounts["b"].service == charged + 2 * 3


def _steps(core: EngineCore) -> Iterator[None]:
    while core.has_work:
        yield


@pytest.mark.parametrize(
    ("resume", "params", "message"),
    [
        (((1,), (2,)), {}, "each choice"),
        ((None,), {}, "one open"),
        (((1,) * 5,), {}, "max_tokens"),
        (((1,),), {"beam_width": 2, "temperature": 0.0}, "beam"),
    ],
)
def test_bad_resumes_are_refused(resume: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Request(
            request_id="r",
            prompt_token_ids=(1, 2),
            sampling_params=SamplingParams(max_tokens=5, **params),
            arrival_time=0.0,
            resume=resume,
        )


def test_resumed_tokens_are_in_the_vocabulary(folder: Path) -> None:
    core = make_core(folder)
    request = replace(make_requests(0)[0], resume=((1, core.info.vocab_size),))
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        core.add_request(request)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Timings(None, None, 1.4), Timings(1.4, None, 1.4)),  # it ended before it began again
        (Timings(1.3, 1.35, 1.4), Timings(1.3, 1.35, 1.4)),
        (Timings(1.6, 1.7, 1.8), Timings(1.5, 1.7, 1.8)),
    ],
)
def test_times_of_a_moved_request_are_in_order(told: Timings, expected: Timings) -> None:
    """The client measures with the ways of messages, the engine without."""
    params = SamplingParams(max_tokens=4)
    now = time.monotonic()
    stream = Stream(
        Request(
            request_id="moved",
            prompt_token_ids=(5, 6),
            sampling_params=params,
            arrival_time=now - 60.0,
        )
    )
    stream.moves, stream.scheduled = 1, 1.5
    tokens = [] if told.first_token is None else [9]
    stream.take(SequenceOutput("moved~1", 0, tokens, finish_reason="abort", timings=told))
    (output,) = stream.items
    assert isinstance(output, SequenceOutput) and output.timings == expected
