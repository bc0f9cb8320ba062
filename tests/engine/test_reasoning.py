"""Where reasoning begins and ends in a sequence of tokens, however its marks are cut."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from quire.engine.reasoning import ReasoningSpec, ReasoningTracker

OPEN, CLOSE = b"<think>", b"</think>"
WORDS = [
    b"<think>", b"</think>", b"<", b"</", b"think", b">", b"th", b"ink", b">\n", b"\n", b" ",
    b"a", b"b", b"so</", b"<<", b"/", b"<think></think>", b"t", b"i", b"nk>", b"x<think",
    b"\n</thi",
]  # fmt: skip
ID_OF = {word: index for index, word in enumerate(WORDS)}
PIECES = {index: word for index, word in enumerate(WORDS) if word not in (b"a", b"b")}


def spec(**fields: object) -> ReasoningSpec:
    values = {"opening": OPEN, "closings": (CLOSE,), "pieces": PIECES, **fields}
    return ReasoningSpec(**values)  # type: ignore[arg-type]


def ids(*words: bytes) -> list[int]:
    return [ID_OF[word] for word in words]


def counted(tokens: list[int], **fields: object) -> int:
    """Count the tokens of the reasoning in the whole text, as the tracker documents it."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(WORDS[token]))
    text = b"".join(WORDS[token] for token in tokens)
    start = len(text) - len(text.lstrip())
    if text[start:].startswith(OPEN):
        start += len(OPEN)
    elif not fields.get("begins_inside"):
        return 0
    elif OPEN.startswith(text[start:]):
        return len(tokens)
    else:
        start = 0
    close = text.find(CLOSE, start)
    close = len(text) if close < 0 else close
    return sum(start <= begin < close for begin, _ in pairwise(ends))


@pytest.mark.parametrize("begins_inside", [False, True])
def test_tokens_between_the_marks_are_counted(begins_inside: bool) -> None:
    rng = random.Random(7)
    seen = set()
    for _ in range(4000):
        tokens = [rng.randrange(len(WORDS)) for _ in range(rng.randrange(12))]
        if rng.random() < 0.6:
            tokens = ids(b"<", b"think", b">") + tokens
        tracker = ReasoningTracker(spec(begins_inside=begins_inside))
        for end, token in enumerate(tokens, 1):
            tracker.read([token])
            assert tracker.num_reasoning_tokens == counted(
                tokens[:end], begins_inside=begins_inside
            ), [WORDS[token] for token in tokens[:end]]
            assert tracker.demanded() is None
        seen.add(tracker.num_reasoning_tokens)
    assert len(seen) > 8


def run(model: list[int], **fields: object) -> list[int]:
    """Return the tokens of an answer: those of `model`, except where others are demanded."""
    tracker = ReasoningTracker(spec(**fields))
    tokens: list[int] = []
    for position in range(40):
        demanded = tracker.demanded()
        assert demanded == tracker.demanded()
        tokens.append(demanded[0] if demanded else model[position % len(model)])
        tracker.read(tokens[-1:])
    return tokens


TEXT_END = tuple(ids(b"</", b"think", b">"))


@pytest.mark.parametrize("end", [tuple(ids(CLOSE)), TEXT_END], ids=["one token", "three tokens"])
@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("opening", [(), (OPEN,), (b"\n", b"<", b"think", b">")])
def test_the_end_follows_after_exactly_the_budget(
    end: tuple[int, ...], budget: int, opening: tuple[bytes, ...]
) -> None:
    model = ids(*opening) + ids(b"a", b"b", b"a", b"b") * 10
    fields = {"budget": budget, "end": end, "begins_inside": not opening}
    tokens = run(model, **fields)
    cut = len(opening) + budget
    assert tokens[:cut] == model[:cut]
    assert tuple(tokens[cut : cut + len(end)]) == end
    assert tokens[cut + len(end) :] == model[cut + len(end) : 40]
    # The number of tokens is that of the documentation.
    tracker = ReasoningTracker(spec(**fields))
    tracker.read(tokens)
    assert tracker.num_reasoning_tokens == budget


def test_reasoning_that_ends_within_its_budget_is_left_alone() -> None:
    for size in range(6):
        reasoning = ids(*[b"a"] * size)
        for closing in ([CLOSE], [b"</", b"think", b">"]):
            model = ids(OPEN) + reasoning + ids(*closing, b"b", b"<", b"a") + ids(b"a") * 40
            for budget in range(size, 9):
                assert run(model, budget=budget, end=tuple(ids(*closing))) == model[:40]


def test_an_answer_without_reasoning_is_left_alone() -> None:
    for words in ((b"a", b"b"), (b"\n", b"a", OPEN, b"b"), (b"<", b"think", b"a"), (b"\n",)):
        model = ids(*words) * 40
        assert run(model, budget=0, end=TEXT_END) == model[:40]


CHANNELS = [
    b"<|channel|>", b"analysis", b"final", b"<|message|>", b"<|end|>", b"<|start|>", b"assistant",
    b"a", b"commentary",
]  # fmt: skip


def test_reasoning_that_may_begin_again_shares_one_budget() -> None:
    channel, analysis, final, message, end, start, assistant, a, commentary = range(9)
    spec = ReasoningSpec(
        opening=b"<|channel|>analysis<|message|>",
        closings=(b"<|end|>", b"<|start|>"),
        pieces={
            index: word
            for index, word in enumerate(CHANNELS)
            if word not in (b"a", b"final", b"assistant", b"commentary")
        },
        repeats=True,
        budget=5,
        end=(end, start, assistant, channel),
        after_end=(final, commentary),
    )
    tracker = ReasoningTracker(spec)
    tracker.read([channel, analysis, message, a, a, a, end])
    assert tracker.num_reasoning_tokens == 3 and tracker.demanded() is None
    tracker.read([start, assistant, channel, commentary, message, a, a, a, a, end])
    assert tracker.num_reasoning_tokens == 3 and tracker.demanded() is None
    tracker.read([start, assistant, channel, analysis, message, a, a])
    for demanded in ((end,), (start,), (assistant,), (channel,), (final, commentary)):
        assert tracker.demanded() == demanded
        tracker.read(demanded[-1:])
    assert tracker.demanded() is None
    tracker.read([message, a, end, start, assistant, channel, analysis, message])
    assert tracker.demanded() == (end,)  # nothing is left
    assert tracker.num_reasoning_tokens == 5
