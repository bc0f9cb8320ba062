from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.parsing.message_events import ContentText, Event, ReasoningText
from quire.server.parsing.reasoning import ReasoningParser, ReasoningStyle, starts_inside, tags_of

from .pieces import cut


def reason(pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    """Return the reasoning and the content of a text in pieces."""
    parser = ReasoningParser(opened=opened)
    events: list[Event] = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish()
    texts = {ReasoningText: "", ContentText: ""}
    for event in events:
        assert isinstance(event, ReasoningText | ContentText) and event.text
        texts[type(event)] += event.text
    return texts[ReasoningText], texts[ContentText]


REASONING = [
    ("<think>\nwhy\n</think>\n\nso", False, "why", "so"),
    ("\n<think>why</think>so</think>", False, "why", "so</think>"),
    ("<think>\n\n</think>\n\n so", False, "", " so"),
    ("so <think>why</think>", False, "", "so <think>why</think>"),
    ("<thin", False, "", "<thin"),
    (" so", False, "", " so"),
    ("<think>wh < y </thin", False, "wh < y </thin", ""),
    ("why</think>so", True, "why", "so"),
    ("\n<think>\nwhy</think>so", True, "why", "so"),
    ("</think>so", True, "", "so"),
    ("why \n", True, "why \n", ""),
    ("<th", True, "<th", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), REASONING)
def test_reasoning(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert reason([text], opened=opened) == (reasoning, content)
    assert reason(list(text), opened=opened) == (reasoning, content)


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "</", "th"]), max_size=12
    ),
    st.booleans(),
    st.randoms(),
)
def test_reasoning_parses_the_same_however_it_is_cut(
    fragments: list[str], opened: bool, rng: random.Random
) -> None:
    text = "".join(fragments)
    whole = reason([text], opened=opened)
    assert reason(list(text), opened=opened) == reason(cut(text, rng), opened=opened) == whole


@pytest.mark.parametrize("style", ["qwen3", "mistral", "seed_oss", "cohere_command3", "gemma4"])
def test_every_style_has_tags_of_its_own(style: ReasoningStyle) -> None:
    opening, closing, _ = tags = tags_of(style)
    text = f"{opening}\nwhy < [x]\n{closing}\nso {closing}"
    for pieces in ([text], list(text)):
        parser = ReasoningParser(opened=False, tags=tags)
        events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningText))
        content = "".join(event.text for event in events if isinstance(event, ContentText))
        assert (reasoning, content) == ("why < [x]", "so " + closing)
    assert starts_inside(style, f"assistant\n{opening}\n")
    assert not starts_inside(style, f"assistant\n{opening}\n{closing}\n")
    assert starts_inside(style, "", continued=f"{closing}{opening}so far")


def test_long_whitespace_is_not_held_back() -> None:
    parser = ReasoningParser(opened=True)
    emitted = "".join(str(event[0]) for event in parser.feed("why" + " " * 1000))
    assert len(emitted) > 900
    assert reason(["why" + " " * 1000 + "</think>"], opened=True) == reason(
        [*("why" + " " * 1000 + "</think>")], opened=True
    )


def test_the_prompt_or_continued_text_may_have_opened_the_reasoning() -> None:
    assert starts_inside("qwen3", "<|im_start|>assistant\n<think>\n")
    assert not starts_inside("qwen3", "<|im_start|>assistant\n")
    assert not starts_inside("qwen3", "say <think><|im_end|>\n<|im_start|>assistant\n")
    assert starts_inside("deepseek_r1", "<｜Assistant｜>")
    assert not starts_inside("deepseek_r1", "<think>\n\n</think>\n\n")
    assert starts_inside("qwen3", "", continued="<think>\nso far")
    assert not starts_inside("deepseek_r1", "", continued="<think>why</think>so far")
