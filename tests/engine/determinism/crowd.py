"""The same requests twice: each one alone, and all of them in a crowd; answers must be equal.

Alone means: no other request in the engine, no prefix cache, no drafts, whole prompts in one step.
A crowd has small steps that cut prompts, few blocks, so that sequences are preempted and computed
again, prefix hits, drafts, forks, aborts and restarts of the engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.lora import AdapterSource
from quire.engine.outputs import SequenceOutput
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

VOCAB_SIZE = 128
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "top_k": 5, "logprobs": 0},
    {"temperature": 1.3, "min_p": 0.05, "frequency_penalty": 0.6, "logprobs": 5},
    {"temperature": 1.0, "presence_penalty": 0.7, "logit_bias": ((5, 4.0),), "logprobs": 1},
    {"temperature": 1.0, "bad_words": ((7,), (11, 12)), "top_k": 12, "logprobs": 1},
    {"temperature": 1.2, "stop_token_ids": (17, 23, 40, 61), "min_tokens": 3, "logprobs": 1},
    {"temperature": 1.0, "n": 3, "logprobs": 1},
    {"temperature": 0.7, "n": 2, "prompt_logprobs": 1, "logprobs": 2},
    {"temperature": 0.0, "n": 2, "beam_width": 3, "logprobs": 1},
)


class Said(NamedTuple):
    """What one choice got: tokens, their log-probabilities, the prompt's, and how it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Any, ...]
    prompt_logprobs: tuple[Any, ...]
    end: tuple[Any, ...]


Answers = dict[tuple[str, int], Said]


@dataclass(frozen=True)
class Body:
    """A kind of model as it is computed on the CPU: `save` writes one into a folder."""

    name: str
    save: Callable[[Path], object]
    fields: dict[str, Any]
    adapters: tuple[str, ...] = ()
    """Names of LoRA adapters, which `save` writes into folders of these names."""

    def config(self, folder: Path, **fields: Any) -> EngineConfig:
        values: dict[str, Any] = {
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 1,
            "max_model_len": 256,
            "max_num_seqs": 16,
        }
        if self.adapters:
            sources = tuple(AdapterSource(name, str(folder / name)) for name in self.adapters)
            values |= {"enable_lora": True, "lora": sources, "max_loras": 2}
        return EngineConfig(**values | self.fields | fields)


def make_requests(seed: int, count: int, adapters: tuple[str, ...] = ()) -> list[Request]:
    """Return random requests with all kinds of sampling. Many prompts begin alike."""
    chance = random.Random(seed)
    stems = [[chance.randrange(3, VOCAB_SIZE) for _ in range(150)] for _ in range(3)]
    requests = []
    for number in range(count):
        own = [chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randint(1, 20))]
        prompt = chance.choice(stems)[: chance.choice([0, 16, 33, 70, 150])] + own * chance.choice(
            [1, 2]
        )
        params = SamplingParams(
            max_tokens=chance.randint(3, 24), seed=number, **chance.choice(SAMPLING)
        )
        requests.append(
            Request(
                request_id=f"r{seed}-{number}",
                prompt_token_ids=tuple(prompt),
                sampling_params=params,
                arrival_time=0.0,
                adapter=chance.choice([None, *adapters]) if adapters else None,
            )
        )
    return requests


def alone(core: EngineCore, requests: list[Request]) -> Answers:
    """Run the requests one after another, and the choices of each one after another."""
    answers: Answers = {}
    for request in requests:
        params = request.sampling_params
        assert params.seed is not None
        if params.beam_width is not None:
            outputs = _run(core, request)
            for choice in range(params.n):
                answers[request.request_id, choice] = _said(outputs[choice])
            continue
        for choice in range(params.n):  # choice c of a request draws with its seed + c
            scores = None if choice else params.prompt_logprobs  # they come with choice 0
            only = replace(params, n=1, seed=params.seed + choice, prompt_logprobs=scores)
            (said,) = _run(core, replace(request, sampling_params=only)).values()
            answers[request.request_id, choice] = _said(said)
    return answers


def _run(core: EngineCore, request: Request) -> dict[int, list[SequenceOutput]]:
    """Return all outputs of a request that is alone, by choice."""
    core.add_request(request)
    outputs: dict[int, list[SequenceOutput]] = {}
    while core.has_work:
        for output in core.step().outputs:
            outputs.setdefault(output.choice, []).append(output)
    return outputs


def crowded(core: EngineCore, requests: list[Request], seed: int) -> Answers:
    """Run the requests together, among others that are aborted."""
    chance = random.Random(seed)
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    waiting = list(requests)
    noise: list[str] = []
    while waiting or core.has_work:
        for _ in range(chance.choice([0, 0, 1, 2, 6])):
            if waiting:
                request = waiting.pop()
                core.add_request(request)
                if chance.random() < 0.2:
                    noise.append(f"noise {len(noise)} {seed}")
                    core.add_request(replace(request, request_id=noise[-1]))
        if noise and chance.random() < 0.2:
            core.abort_request(chance.choice(noise))
        for output in core.step().outputs:
            outputs.setdefault((output.request_id, output.choice), []).append(output)
    stats = core.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return {
        (request.request_id, choice): _said(outputs[request.request_id, choice])
        for request in requests
        for choice in range(request.sampling_params.n)
    }


def _said(outputs: list[SequenceOutput]) -> Said:
    last = outputs[-1]
    return Said(
        tuple(token for output in outputs for token in output.token_ids),
        tuple(entry for output in outputs for entry in output.logprobs or ()),
        tuple(entry for output in outputs for entry in output.prompt_logprobs or ()),
        (last.finish_reason, last.stop_reason, last.error),
    )


def differences(
    body: Body, folder: Path, num_requests: int, seed: int, **fields: Any
) -> Iterator[tuple[str, Said, Said]]:
    """Yield the choices that got something else in the crowd than alone, and what they got."""
    requests = make_requests(seed, num_requests, body.adapters)
    quiet = body.config(
        folder,
        enable_prefix_caching=False,
        num_blocks=64,
        max_num_batched_tokens=512,
        speculation="off",
        **fields,
    )
    core = EngineCore(quiet, Worker(quiet))
    expected = alone(core, requests)
    busy = body.config(
        folder,
        num_blocks=24 * len(core.info.group_windows),  # each group of layers has its own blocks
        max_num_batched_tokens=40,
        num_speculative_tokens=5,
        **fields,
    )
    found: Answers = {}
    half = len(requests) // 2
    preemptions = hits = 0
    for part in (requests[:half], requests[half:]):  # an engine, and the next one
        core = EngineCore(busy, Worker(busy))
        found |= crowded(core, part, seed)
        preemptions += core.stats().preemptions
        hits += core.stats().prefix_hits
    assert found.keys() == expected.keys()
    assert num_requests < 100 or (preemptions and hits)
    for key, said in expected.items():
        if found[key] != said:
            yield f"{key[0]}/{key[1]}", said, found[key]
