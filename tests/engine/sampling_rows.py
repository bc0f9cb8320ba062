"""Sequences to sample, and an oracle that draws from them with transformers' logits processors."""

from __future__ import annotations

from collections import abc
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quire.engine.devices.cpu.draws import CpuDraws
from quire.engine.grammar.bad_words import banned_tokens
from quire.engine.request import Request
from quire.engine.sampling.counter_rng import exponential, stream_keys
from quire.engine.sampling.sampler import Sampler, SamplerOutput
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Rank, Sequence
from quire.engine.step import SequenceSpec

CPU = torch.device("cpu")
EOS = 2
VOCAB = 97

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1e-8},
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_k": 10**9},
    {"top_p": 0.1},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    {"top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"repetition_penalty": 100.0, "temperature": 1e-5, "top_k": 2**31 - 1},
    {"repetition_penalty": 0.01, "presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0, "temperature": 0.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.7, "temperature": 0.0},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_k": 9},
    {"logit_bias": ((5, 3.0), (6, -100.0), (7, 1.5))},
    {"logit_bias": ((11, 100.0),)},
    {"allowed_token_ids": (4, 8, 15, 16, 23, 42)},
    {"allowed_token_ids": (4, 8, 15), "top_k": 10},
    {"allowed_token_ids": (4,), "top_p": 0.5},
    {"min_tokens": 10, "temperature": 0.0},
    {"min_tokens": 10, "top_p": 0.9},
    {"bad_words": ((EOS,), (5, 7, EOS - 1)), "temperature": 0.0},
    {"bad_words": ((EOS,), (7, 40), (5, 7, 41), (9, 5, 7, 42), (7, 7, 30, 5, 7, 43)), "top_k": 9},
    {"bad_words": tuple((7, token) for token in range(90)), "min_tokens": 6},
]
"""Sampling parameters that use every filter, by itself and combined."""


def rows(count: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Return random logits `[count, vocab]`."""
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def make_sequence(
    *,
    prompt: abc.Sequence[int] = (1, 2, 3),
    output: abc.Sequence[int] = (),
    own_seed: int = 0,
    stop_ids: abc.Sequence[int] = (EOS,),
    **params: Any,
) -> SequenceSpec:
    """Make a sequence; tests append the tokens known on the device to its `token_ids`."""
    sampling_params = SamplingParams(**{"max_tokens": 64, **params})
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling_params=sampling_params,
        arrival_time=0.0,
    )
    sequence = Sequence(request, 0, own_seed, Rank(0, 0, 0), frozenset(stop_ids)).spec()
    sequence.token_ids.extend(output)
    return sequence


def make_sampler(vocab_size: int) -> Sampler:
    """Make a sampler as a worker on the CPU does."""
    return Sampler(vocab_size, CPU, CpuDraws(vocab_size))


def sample(
    logits: torch.Tensor, sequences: list[SequenceSpec], sampler: Sampler | None = None
) -> SamplerOutput:
    sampler = sampler or make_sampler(logits.shape[1])
    banned = {
        row: banned_tokens(words, sequence.token_ids, sequence.num_prompt_tokens)
        for row, sequence in enumerate(sequences)
        if (words := sequence.sampling_params.bad_words)
    }
    return sampler(logits, sampler.prepare(sequences, banned=banned))


def softmax_after_filters(logits: torch.Tensor, sequence: SequenceSpec) -> torch.Tensor:
    """Return the probabilities [V], in float64, that the filters leave of a row [V] of logits.

    They are one-hot for a greedy row, and NaN if no token is left.
    """
    params = sequence.sampling_params
    prompt_length = sequence.num_prompt_tokens
    tokens = torch.tensor([sequence.token_ids])
    scores = logits.double().unsqueeze(0).clone()
    if params.allowed_token_ids is not None:
        forbidden = torch.ones(scores.shape[1], dtype=torch.bool)
        forbidden[list(params.allowed_token_ids)] = False
        scores[:, forbidden] = -torch.inf
    if len(sequence.token_ids) - prompt_length < params.min_tokens:
        scores[:, list(sequence.stop_ids)] = -torch.inf
    if params.bad_words:
        # It counts the prompt as well, and asks for a token before a word; here is one of no word.
        output = torch.tensor([[scores.shape[1], *sequence.token_ids[prompt_length:]]])
        scores = NoBadWordsLogitsProcessor([list(word) for word in params.bad_words])(
            output, scores
        )
    for token_id, value in params.logit_bias:
        scores[0, token_id] += value
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(tokens, scores)
    counts = torch.bincount(tokens[0, prompt_length:], minlength=scores.shape[1])
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.greedy and scores.isneginf().all():
        return torch.full_like(scores[0], torch.nan)
    if params.greedy:
        return torch.nn.functional.one_hot(scores[0].argmax(), scores.shape[1]).double()
    scores = TemperatureLogitsWarper(params.temperature)(tokens, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(tokens, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(tokens, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(tokens, scores)
    return scores[0].softmax(dim=0)


def expected_token(logits: torch.Tensor, sequence: SequenceSpec) -> int:
    """Return the winner of the race among the oracle's probabilities."""
    probabilities = softmax_after_filters(logits, sequence)
    keys = stream_keys(torch.tensor([sequence.seed]), torch.tensor([len(sequence.token_ids)]))
    race = probabilities / exponential(keys, torch.arange(len(logits)))[0].double()
    return int(race.argmax())
