"""The manual's facts, and the many ways in which people ask about them."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

MANUAL_PATH = Path(__file__).with_name("manual.txt")

NOUN_TEMPLATES = (
    "What is {}?",
    "What's {}?",
    "What are {}?",
    "Explain {}",
    "Can you explain {}?",
    "Tell me about {}",
    "What does {} mean?",
    "Define {}",
    "I do not understand {}",
    "What do you know about {}?",
    "Give me a short explanation of {}",
    "{}?",
    "What about {}?",
    "Could you describe {}?",
    "I have a question about {}",
    "I would like to know about {}",
    "How would you describe {}?",
    "What should I know about {}?",
)
VERB_TEMPLATES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How do you {}?",
    "I want to {}",
    "I need to {}",
    "Can I {}?",
    "What is the best way to {}?",
    "Which option lets me {}?",
    "Is there a way to {}?",
    "Tell me how to {}",
    "Explain how to {}",
    "How would I {}?",
    "What do I have to do to {}?",
    "Is it possible to {}?",
    "I am trying to {}, what do I do?",
    "Show me how to {}",
    "What if I want to {}?",
    "I'd like to {}",
    "How should I {}?",
)
OPENERS = (
    "Hey, ", "Hi, ", "Hello, ", "Please, ", "Hi! ", "Hello! ", "Quick question: ", "Question: ",
    "Sorry, ", "Ok, ", "Okay, so ", "So, ", "Well, ", "Please tell me: ", "I wonder, ", "Hey quire, ",
    "And ", "One more thing: ", "Also, ", "Thanks. ", "Great. ",
)  # fmt: skip
CLOSERS = (
    " Please.", " please", " Thanks!", " thanks", " Thank you.", " in quire?", " in quire",
    " Be brief.", " Keep it short.", " in one sentence", " exactly?", " again?", " here?",
    " I am new to this.", " on this server?", " in simple words",
)  # fmt: skip
KEY_NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svxsdghjuklknbipwtdrycqzta", strict=True))


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and the phrasings that lead to it; `unseen` ones are for evaluation only."""

    name: str
    answer: str
    questions: tuple[str, ...]
    unseen: tuple[str, ...]
    held_out: tuple[str, ...]


def _is_held_out(question: str) -> bool:
    return zlib.crc32(question.lower().encode()) % 16 == 0


def _parse(block: str) -> Fact:
    head, *lines = [line for line in block.splitlines() if line]
    fields = dict.fromkeys(("is", "do", "q", "h", "a"), "")
    for line in lines:
        key, value = line.split(": ", 1)
        fields[key] = value

    def alternatives(key: str) -> list[str]:
        return [part.strip() for part in fields[key].split(" | ") if part.strip()]

    filled = [t.format(p) for p in alternatives("is") for t in NOUN_TEMPLATES]
    filled += [t.format(p) for p in alternatives("do") for t in VERB_TEMPLATES]
    # A fact's own whole questions weigh as much as what the templates make of it.
    asked = alternatives("q")
    kept = [question for question in filled if not _is_held_out(question)]
    repeats = max(1, len(kept) // (2 * len(asked))) if asked else 0
    return Fact(
        name=head.strip("[]"),
        answer=fields["a"],
        questions=tuple(kept + asked * repeats),
        unseen=tuple(alternatives("h")),
        held_out=tuple(question for question in filled if _is_held_out(question)),
    )


def load_facts(path: Path = MANUAL_PATH) -> list[Fact]:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [_parse("[" + block) for block in text.split("\n[") if "]" in block]


def _typo(rng: random.Random, text: str) -> str:
    """One slip of the finger inside a plain word of four letters or more."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not places:
        return text
    index = rng.choice(places)
    word = words[index]
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind == 1:
        word = word[:at] + word[at + 1 :]
    elif kind == 2:
        word = word[:at] + word[at] + word[at:]
    else:
        letter = KEY_NEIGHBOURS.get(word[at], word[at])
        word = word[:at] + letter + word[at + 1 :]
    words[index] = word
    return " ".join(words)


def vary(rng: random.Random, question: str, *, wrap: bool = True) -> str:
    """The same question as different people type it."""
    text = question
    if rng.random() < 0.4:
        text = text.rstrip("?.")
    if wrap and rng.random() < 0.15:
        text = text.rstrip("?.") + rng.choice(CLOSERS)
    if wrap and rng.random() < 0.2:
        opener = rng.choice(OPENERS)
        text = opener + (text if text[:2].isupper() else text[:1].lower() + text[1:])
    if rng.random() < 0.35:
        text = text.lower()
    elif rng.random() < 0.03:
        text = text.upper()
    if rng.random() < 0.15:
        text = _typo(rng, text)
        if rng.random() < 0.3:
            text = _typo(rng, text)
    if rng.random() < 0.04:
        text += rng.choice(("??", " ?", "...", "!", "?!", "."))
    return text
