"""Short stories, as answers and as plain text."""

from __future__ import annotations

import random

from manual import vary
from skills import Message, turn
from words import ANIMALS, MOODS, NAMES, OBJECTS, PLACES


def article(noun: str) -> str:
    """Return the word with its indefinite article."""
    return ("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun


# Long, because it is one list of alternatives for each sentence of the story.
def story(rng: random.Random, animal: str, name: str, thing: str, place: str) -> str:
    """Write a story of six or seven sentences around these words."""
    friend = rng.choice([n for n in NAMES if n != name])
    other = rng.choice([a for a in ANIMALS if a != animal])
    mood, day = (
        rng.choice(MOODS),
        rng.choice(("One morning", "One day", "One evening", "One sunny day")),
    )
    opening = rng.choice(
        (
            f"Once upon a time, there was {article(mood)} {animal} named {name}.",
            f"There once was {article(animal)} called {name}, who was very {mood}.",
            f"In a quiet {place} lived {article(mood)} {animal} named {name}.",
        )
    )
    find = rng.choice(
        (
            f"{day}, {name} found {article(thing)} near the {place}.",
            f"{day}, {name} went to the {place} and saw {article(thing)} on the ground.",
            f"{day}, {name} lost {article(thing)} somewhere in the {place}.",
        )
    )
    lost = " lost " in find
    meet = rng.choice(
        (
            f'Then {article(other)} named {friend} came along and asked, "What are you doing?"',
            f"On the way {name} met {friend}, {article(other)} who lived there.",
        )
    )
    if lost:
        middle = f'"I cannot find my {thing}," said {name}. {friend} helped to look for it.'
        close = rng.choice(
            (
                f"Together they found the {thing} under a leaf, and {name} laughed with joy.",
                f"At last {friend} saw the {thing} behind a tree, and {name} said thank you.",
            )
        )
    else:
        middle = rng.choice(
            (
                f'"This is my {thing}," said {friend}. {name} gave it back at once.',
                f"{name} showed {friend} the {thing}, and they played with it all day.",
            )
        )
        close = rng.choice(
            (
                f"{friend} was so happy that they shared a meal by the {place}.",
                f"When the sun went down, they took the {thing} home together.",
            )
        )
    end = rng.choice(
        (
            f"From that day on, {name} and {friend} were best friends.",
            f"And {name} the {animal} slept well that night.",
            f"{name} learned that it is good to have a friend.",
            "The end.",
        )
    )
    return " ".join((opening, find, meet, middle, close, end))


STORY_FORMS = (
    "Tell me a story about {}", "Write a short story about {}", "Tell a story about {}",
    "Can you tell me a story about {}?", "I want a story about {}", "A story about {}, please",
    "Make up a story about {}", "Story about {}", "Please write a little story about {}",
    "Tell me a bedtime story about {}", "Write me a tale about {}",
)  # fmt: skip


def story_turn(rng: random.Random) -> list[Message]:
    """Draw a request for a story, or for the continuation of one, with the answer."""
    animal, name = rng.choice(ANIMALS), rng.choice(NAMES)
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    text = story(rng, animal, name, thing, place)
    kind = rng.random()
    if kind < 0.12:
        ask = rng.choice(
            ("Tell me a story", "Tell me another story", "Write a story", "I want to hear a story")
        )
        return turn(vary(rng, ask), text)
    if kind < 0.22:
        sentences = text.split(". ")
        given = sentences[0] + "."
        ask = rng.choice(("Continue this story: ", "Go on: ", "Continue: ", "What happens next? "))
        return turn(ask + given, ". ".join(sentences[1:]))
    about = rng.choice(
        (
            article(animal),
            article(animal),
            f"{article(animal)} named {name}",
            f"{article(animal)} called {name}",
            f"{article(animal)} and {article(thing)}",
            f"{article(animal)} and {article(thing)} in the {place}",
            f"{article(animal)} in the {place}",
            f"{name} the {animal}",
        )
    )
    return turn(vary(rng, rng.choice(STORY_FORMS).format(about), wrap=rng.random() < 0.3), text)


def plain_story(rng: random.Random) -> str:
    """Draw a story."""
    return story(
        rng, rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES)
    )
