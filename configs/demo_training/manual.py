"""The facts of the manual, and the many ways in which people ask about them."""

# ruff: noqa: E501, SIM905  (word lists read best as packed lines)

from __future__ import annotations

import random
import re
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
SYNONYMS: dict[str, tuple[str, ...]] = {
    "change": ("alter", "modify", "switch", "adjust", "edit"),
    "set": ("configure", "specify", "define", "choose", "pick", "put"),
    "use": ("try", "apply", "work with", "take"),
    "get": ("obtain", "receive", "have", "fetch", "read"),
    "limit": ("cap", "bound", "restrict", "cut down"),
    "see": ("view", "check", "find", "look at", "watch"),
    "make": ("let", "have", "get"),
    "run": ("start", "launch", "operate", "execute"),
    "start": ("launch", "run", "bring up", "fire up", "begin"),
    "stop": ("end", "halt", "turn off", "quit"),
    "send": ("post", "pass", "submit", "give"),
    "answer": ("reply", "response", "output", "result"),
    "answers": ("replies", "responses", "outputs"),
    "request": ("call", "query", "job"),
    "requests": ("calls", "queries", "users"),
    "server": ("service", "process", "program", "machine", "engine"),
    "model": ("network", "checkpoint", "LLM"),
    "flag": ("option", "switch", "setting", "argument", "parameter"),
    "parameter": ("field", "option", "setting", "argument"),
    "memory": ("RAM", "space", "VRAM", "room"),
    "full": ("used up", "taken", "exhausted"),
    "error": ("failure", "problem", "message"),
    "happens": ("occurs", "goes on", "takes place"),
    "support": ("handle", "offer", "know", "do"),
    "measure": ("find", "benchmark", "test", "compute"),
    "shared": ("common", "reused"),
    "work": ("function", "operate", "go"),
    "fast": ("quick", "speedy"),
    "slow": ("sluggish", "laggy", "crawling"),
    "prompt": ("input", "text", "document", "question"),
    "turn off": ("disable", "switch off", "deactivate", "remove"),
    "turn on": ("enable", "switch on", "activate"),
    "clients": ("users", "apps", "programs"),
    "tokens": ("words", "pieces"),
    "list": ("show", "print", "name"),
    "connect": ("link", "hook up", "point", "attach"),
}
FILLERS = frozenset(
    "a an the is are do does did i you me my your to of in on for it this that can could would "
    "should how what which why where when please tell about with there have want need".split()
)
FRAGMENT_FORMS = ("{}", "{}?", "What about {}?", "You said: {}", "Tell me more: {}", "Why {}?")
KEY_NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svxsdghjuklknbipwtdrycqzta", strict=True))


@dataclass(frozen=True, slots=True)
class Fact:
    """An answer and its questions.

    `questions` are for training, both hand-written and made from templates. Only the evaluation
    asks the others: `held_out` are made from templates, `unseen` are hand-written.
    """

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
    # Repeat the questions written for the fact, so that they weigh as much as the templates'.
    asked = alternatives("q")
    kept = [question for question in filled if not _is_held_out(question)]
    repeats = max(1, len(kept) // (2 * len(asked))) if asked else 0
    return Fact(
        name=head.strip("[]"),
        answer=fields["a"],
        questions=tuple(kept + asked * repeats),
        unseen=tuple(alternatives("h")),
        held_out=tuple(q for q in filled if _is_held_out(q) and q not in asked),
    )


def load_facts(path: Path = MANUAL_PATH) -> list[Fact]:
    """Parse the manual."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [_parse("[" + block) for block in text.split("\n[") if "]" in block]


def _typo(rng: random.Random, text: str) -> str:
    """Make one typing mistake inside a plain word of four letters or more."""
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


def ask(rng: random.Random, fact: Fact) -> str:
    """Draw a question about the fact, or sometimes only words of a question or of the answer."""
    kind = rng.random()
    if kind < 0.06:
        words = fact.answer.split()
        length = rng.randrange(3, 8)
        at = rng.randrange(max(1, len(words) - length))
        fragment = " ".join(words[at : at + length]).rstrip(".,;:")
        return rng.choice(FRAGMENT_FORMS).format(fragment)
    question = rng.choice(fact.questions)
    if kind < 0.14:
        return _keywords(rng, question)
    return _synonyms(rng, question) if kind < 0.5 else question


def _keywords(rng: random.Random, question: str) -> str:
    """Reduce a question to its keywords, as people type them into a search box."""
    words = [w for w in question.rstrip("?.").split() if w.lower() not in FILLERS]
    if len(words) < 2:
        return question
    if rng.random() < 0.4:
        rng.shuffle(words)
    return " ".join(words)


def _synonyms(rng: random.Random, question: str) -> str:
    """Replace some words by synonyms."""
    for word, others in SYNONYMS.items():
        if f" {word}" in question and rng.random() < 0.6:
            question = re.sub(rf"(?<![\w-]){word}\b", rng.choice(others), question, count=1)
    return question


def vary(rng: random.Random, question: str, *, wrap: bool = True) -> str:
    """Return the question as different people type it, with slips, openers and closers."""
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
