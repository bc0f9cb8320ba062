"""Random requests, and what each client does with its own; all are drawn beforehand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire.engine.request import GrammarSpec, Request
from quire.engine.sampling_params import SamplingParams

from ..harness import expected_beams, expected_tokens
from .engine import EOS

STEM = random.Random(5).choices(range(50, 4000), k=60)
"""Tokens with which the prompts of many requests begin."""
ADAPTERS = "abc"
"""Names of adapters; the first is never unloaded."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One request, and what its client does and suffers. Times are in seconds."""

    request: Request
    at: float
    client: int
    leaves_after: int | None = None
    """Tokens after which the client disconnects."""
    leaves_at: float | None = None
    """Time after its start at which the client disconnects, whatever it has got."""
    aborts: tuple[int, int] | None = None
    """A choice that the client aborts, and after how many tokens."""
    pause: float = 0.0
    """Time that the client takes to read an output."""
    row_fault: str | None = None
    fails_after: int = 0
    grammar_fails_after: int | None = None
    compiles_for: float = 0.0
    is_offender: bool = False
    """Whether no step with it fits into the device's memory, from `fails_after` tokens on."""
    is_poison: bool = False
    """Whether each step with it brings its engine down."""

    @property
    def may_fail(self) -> set[str]:
        """Codes of the errors that may end the request because of what is injected into it."""
        codes = set()
        if self.row_fault is not None:
            codes.add(self.row_fault)
        if self.grammar_fails_after is not None:
            codes.add("grammar_failed")
        if self.is_offender:
            codes.add("device_out_of_memory")
        return codes


def answer(request: Request, choice: int) -> list[int]:
    """Return the tokens that the request gets if it is alone and nothing fails."""
    params = request.sampling_params
    prompt = list(request.prompt_token_ids)
    if request.pooling is not None:
        return []
    stops = set(params.stop_token_ids)
    if not params.ignore_eos or request.grammar is not None:
        stops.add(EOS)
    if params.beam_width is not None:
        return expected_beams(prompt, params, tuple(stops))[choice]
    tokens = expected_tokens(prompt, choice, params.max_tokens)
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


def _params(rng: random.Random) -> SamplingParams:
    if rng.random() < 0.06:
        width = rng.choice([1, 2, 3])
        return SamplingParams(
            max_tokens=rng.randrange(1, 6),
            temperature=0.0,
            beam_width=width,
            n=rng.randint(1, width),
            ignore_eos=rng.random() < 0.5,
            early_stopping=rng.choice([False, True, "never"]),
        )
    return SamplingParams(
        max_tokens=rng.choice([0, *range(1, 24)]),
        n=rng.choice([1, 1, 1, 1, 2, 4]),
        stop_token_ids=tuple(rng.sample(range(3, 100), rng.choice([0, 0, 4]))),
        bad_words=rng.choice([(), (), (), ((1, 2),)]),
        ignore_eos=rng.random() < 0.5,
    )


def _request(rng: random.Random, number: int, at: float, swarm: set[str]) -> Request:
    shared = STEM[: rng.randrange(len(STEM))] if rng.random() < 0.5 else []
    prompt = shared + [rng.randrange(50, 54) for _ in range(rng.randrange(1, 25))]
    params = _params(rng)
    request = Request(
        request_id=f"r{number}",
        prompt_token_ids=tuple(prompt),
        sampling_params=params,
        arrival_time=at,
        priority=rng.randrange(3),
        cache_salt=rng.choice([None, None, "one", "other"]),
        user=rng.choice([None, "k:a", "k:b", "l"]),
        adapter=rng.choice([None, *ADAPTERS]) if "adapters" in swarm else None,
    )
    if "deadlines" in swarm and rng.random() < 0.2:
        request = replace(request, deadline=at + rng.uniform(0.0, 3.0))
    if "deadlines" in swarm and rng.random() < 0.2:
        request = replace(request, queue_deadline=at + rng.uniform(0.0, 2.0))
    if params.beam_width is None and rng.random() < 0.15:
        request = replace(request, grammar=GrammarSpec("regex", ".*"))
    elif rng.random() < 0.04:
        request = replace(request, pooling="last", sampling_params=SamplingParams(max_tokens=0))
    elif params.beam_width is None and rng.random() < 0.15:
        guess = [token if rng.random() < 0.9 else 3 for token in answer(request, 0)]
        request = replace(request, prediction=tuple(guess))
    return request


def make_plans(
    rng: random.Random, num_requests: int, pace: float, num_clients: int, swarm: set[str]
) -> list[Plan]:
    """Draw requests. `pace` is the mean time between two of them, and `swarm` names the kinds of
    behaviour and faults that occur."""
    plans: list[Plan] = []
    at = 1.0
    for number in range(num_requests):
        # Some come together, and now and then nobody comes for a while.
        at += rng.choice([0.0, rng.expovariate(1 / pace), rng.expovariate(1 / pace)])
        if rng.random() < 0.01:
            at += rng.uniform(1.0, 10.0)
        request = _request(rng, number, at, swarm)
        params = request.sampling_params
        options: dict[str, Any] = {}
        if "disconnects" in swarm and rng.random() < 0.2:
            options["leaves_after"] = rng.randrange(0, 2 * params.max_tokens + 1)
        if "disconnects" in swarm and rng.random() < 0.1:
            options["leaves_at"] = rng.uniform(0.0, 2.0)
        if "aborts" in swarm and rng.random() < 0.2:
            options["aborts"] = (rng.randrange(params.n), rng.randrange(params.max_tokens + 1))
        if "slow readers" in swarm and rng.random() < 0.2:
            options["pause"] = rng.uniform(0.0, 0.2)
        if "bad rows" in swarm and rng.random() < 0.06:
            options["row_fault"] = rng.choice(["non_finite_logits", "step_failed"])
            options["fails_after"] = rng.randrange(0, params.max_tokens + 1)
        if request.grammar is not None and "grammars" in swarm:
            options["compiles_for"] = rng.choice([0.0, rng.expovariate(2.0)])
            if rng.random() < 0.3:
                options["grammar_fails_after"] = rng.randrange(0, params.max_tokens + 1)
        if "out of memory" in swarm and rng.random() < 0.02:
            options["is_offender"] = True
            options["fails_after"] = rng.choice([0, rng.randrange(0, params.max_tokens + 1)])
        plans.append(Plan(request=request, at=at, client=rng.randrange(num_clients), **options))
    if "poison" in swarm:
        number = rng.randrange(num_requests)
        plans[number] = replace(plans[number], is_poison=True)
        # Those before it come with it, so that they run beside it.
        for other in range(max(0, number - 5), number):
            late = plans[number].at - plans[other].at
            request = plans[other].request.shifted(late)
            plans[other] = replace(plans[other], at=plans[number].at, request=request)
    return plans


def is_cut_of(tokens: Sequence[int], whole: Sequence[int]) -> bool:
    """Return whether `tokens` are the first ones of `whole`."""
    return list(tokens) == list(whole[: len(tokens)])
