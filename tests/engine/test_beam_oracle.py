"""Compare beam search with transformers' `generate`, in fp32.

The hypotheses, their order and their scores are the same, whatever else runs and however often the
beams are preempted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from quire.engine.request import Request

from . import models
from .test_oracle import Engine, prompts

EOS = 2
MAX_TOKENS = 24


class Best(NamedTuple):
    tokens: list[int]
    score: float


class Reference:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Tokens that the model likes, so that hypotheses of all lengths finish.
        often = Counter(
            token
            for prompt in prompts(6)
            for token in models.generate(model, prompt, MAX_TOKENS)[2:]
        )
        self.stops = tuple(token for token, _ in often.most_common(12)[4:8])
        self._known: dict[Any, list[Best]] = {}

    def search(self, prompt: list[int], **fields: Any) -> list[Best]:
        key = (tuple(prompt), tuple(fields.items()))
        if key not in self._known:
            self._known[key] = self._search(prompt, **fields)
        return self._known[key]

    def _search(
        self,
        prompt: list[int],
        *,
        beam_width: int,
        length_penalty: float,
        early_stopping: Any,
        min_tokens: int = 0,
        stop_token_ids: tuple[int, ...] = (),
    ) -> list[Best]:
        ends = [EOS, *stop_token_ids]
        with torch.no_grad():
            output: Any = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=MAX_TOKENS,
                min_new_tokens=min_tokens or None,
                do_sample=False,
                num_beams=beam_width,
                num_return_sequences=beam_width,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                eos_token_id=ends,
                return_dict_in_generate=True,
                output_scores=True,
            )
        found = []
        for row, score in zip(output.sequences, output.sequences_scores, strict=True):
            tokens = row[len(prompt) :].tolist()
            end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            found.append(Best(tokens[: end + 1], score.item()))
        return found


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp(request.param)
    yield folder, Reference(models.save_model(request.param, folder))


def found(engine: Engine, request: Request) -> list[Best]:
    """Return the engine's hypotheses, with scores from the log-probabilities it reported."""
    params = request.sampling_params
    best = []
    for choice in range(params.n):
        [output] = engine.outputs[request.request_id, choice]
        assert output.logprobs is not None
        assert [entry.token_id for entry in output.logprobs] == output.token_ids
        total = sum(entry.logprob for entry in output.logprobs)
        ended = output.token_ids[-1] in (EOS, *params.stop_token_ids)
        assert output.finish_reason == ("stop" if ended else "length")
        assert len(output.token_ids) == MAX_TOKENS or ended
        length = len(output.token_ids)
        best.append(Best(output.token_ids, total / length**params.length_penalty))
    return best


def assert_equal(got: list[Best], want: list[Best]) -> None:
    assert [best.tokens for best in got] == [best.tokens for best in want]
    assert [best.score for best in got] == pytest.approx([best.score for best in want], abs=1e-4)


CASES: list[dict[str, Any]] = [
    {"beam_width": width, "length_penalty": penalty, "early_stopping": early}
    for width, penalty, early in [
        (2, 1.0, False), (3, 1.0, True), (4, 1.0, "never"), (5, 0.0, "never"),
        (5, 2.0, False), (4, -1.0, False), (3, 0.6, "never"), (2, 1.5, True),
    ]
]  # fmt: skip

MODES: dict[str, dict[str, Any]] = {
    "blocks-of-16": {},
    "blocks-of-64": {"block_size": 64, "num_blocks": 64},
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 22, "max_num_batched_tokens": 64},
    "preempted-ahead": {"num_blocks": 22, "async_scheduling": True},
    "preempted-uncached": {"num_blocks": 22, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_hypotheses_equal_generate(family: tuple[Path, Reference], mode: str) -> None:
    """Eight searches run with eight ordinary requests; the second time, prefixes are cached."""
    folder, reference = family
    engine = Engine(folder, **MODES[mode])
    wanted = [
        (prompt, {**CASES[i], "stop_token_ids": reference.stops})
        for i, prompt in enumerate(prompts(8))
    ]
    for _ in range(2):
        searches, plain = [], []
        for i, (prompt, fields) in enumerate(wanted):
            n = fields["beam_width"]
            searches.append(
                engine.add(prompt, MAX_TOKENS, n=n, logprobs=0, ignore_eos=False, **fields)
            )
            plain.append(engine.add(prompt, 5 + i, n=1 + i % 2))
        engine.run()
        for search, other, (prompt, fields) in zip(searches, plain, wanted, strict=True):
            assert_equal(found(engine, search), reference.search(prompt, **fields))
            for choice in range(other.sampling_params.n):
                tokens = engine.tokens(other, choice)
                assert tokens == models.generate(reference.model, prompt, len(tokens))
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    lengths = {len(best.tokens) for search in searches for best in found(engine, search)}
    assert len(lengths) > 4  # they end early, late and in between


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_min_tokens_equals_generate(
    family: tuple[Path, Reference], early_stopping: bool | str
) -> None:
    folder, reference = family
    engine = Engine(folder)
    for prompt in prompts(3, longest=40):
        fields: dict[str, Any] = {
            "beam_width": 4,
            "length_penalty": 0.8,
            "early_stopping": early_stopping,
            "min_tokens": 9,
            "stop_token_ids": reference.stops,
        }
        request = engine.add(prompt, MAX_TOKENS, n=4, logprobs=0, ignore_eos=False, **fields)
        engine.run()
        assert_equal(found(engine, request), reference.search(prompt, **fields))


def test_logprobs_are_those_of_the_model(family: tuple[Path, Reference]) -> None:
    folder, reference = family
    engine = Engine(folder)
    prompt = prompts(1)[0]
    request = engine.add(prompt, 8, n=2, beam_width=3, logprobs=4, prompt_logprobs=1)
    engine.run()
    for choice in range(2):
        [output] = engine.outputs[request.request_id, choice]
        want = models.logprobs(reference.model, prompt + output.token_ids)
        assert output.logprobs is not None
        for i, entry in enumerate(output.logprobs):
            row = want[len(prompt) + i - 1]
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            best = row.topk(4)
            assert entry.top_token_ids == best.indices.tolist()
            assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
        entries = output.prompt_logprobs
        assert entries is None if choice else len(entries or ()) == len(prompt)
