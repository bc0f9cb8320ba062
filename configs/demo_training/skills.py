"""Conversations other than the manual: sums, JSON, small talk, echoes, and honest refusals.

Each `…_turn` draws one question and its answer from `rng`, as a list of messages. Stories and tool
calls have files of their own.
"""

# ruff: noqa: E501, SIM905  (word lists read best as packed lines)

from __future__ import annotations

import json
import random
import zlib
from typing import Any

from manual import vary
from words import (
    ANIMALS,
    CITIES,
    COLOURS,
    COMMON,
    DAYS,
    FOODS,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITES,
    TOPICS,
)

Message = dict[str, Any]


def turn(question: str, answer: str) -> list[Message]:
    """Return a question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# --- sums -----------------------------------------------------------------------------------

SUM_FORMS = (
    "What is {}?", "{}", "{} =", "{} = ?", "{}?", "Calculate {}", "Compute {}", "How much is {}?",
    "What's {}?", "Please calculate {}", "Can you compute {}?", "Tell me {}", "Solve {}",
    "Work out {}", "What does {} give?", "What is the result of {}?", "What does {} equal?",
)  # fmt: skip
SPOKEN = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} added"),
    "-": ("{a} minus {b}", "the difference of {a} and {b}", "{a} less {b}"),
    "*": ("{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
    "/": ("{a} divided by {b}", "{a} over {b}"),
}
SYMBOLS = {"+": "+", "-": "-", "*": "×", "/": "÷"}


def is_held_out_sum(a: int, b: int) -> bool:
    """Return True for pairs of two or more digits that training never sees, in either order."""
    low, high = sorted((a, b))
    return low > 9 and zlib.crc32(f"{low},{high}".encode()) % 40 == 0


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def operands(rng: random.Random, operator: str) -> tuple[int, int]:
    """Draw two numbers that suit the operator."""
    if operator == "*":
        return (
            (rng.randrange(13), rng.randrange(13))
            if rng.random() < 0.7
            else (
                rng.randrange(10, 100),
                rng.randrange(2, 10),
            )
        )
    if operator == "/":
        b = rng.randrange(1, 13)
        return b * rng.randrange(13), b
    a = _number(rng, rng.choice((1, 2, 2, 3, 3)))
    b = _number(rng, rng.choice((1, 2, 2, 3, 3)))
    if operator == "-" and a < b and rng.random() < 0.8:
        a, b = b, a
    return a, b


def sum_turn(rng: random.Random) -> list[Message]:
    """Draw a sum, difference, product or quotient, or a problem in words."""
    if rng.random() < 0.08:
        return _word_problem(rng)
    operator = rng.choices("+-*/", (5, 3, 2, 1))[0]
    a, b = operands(rng, operator)
    while is_held_out_sum(a, b):
        a, b = operands(rng, operator)
    return turn(_ask_sum(rng, a, b, operator), sum_answer(a, b, operator))


def _ask_sum(rng: random.Random, a: int, b: int, operator: str) -> str:
    if rng.random() < 0.3:
        text = rng.choice(SPOKEN[operator]).format(a=a, b=b)
    else:
        sign = operator
        if operator in "*/" and rng.random() < 0.4:
            sign = rng.choice(("x", "×")) if operator == "*" else "÷"
        text = f"{a}{sign}{b}" if rng.random() < 0.3 else f"{a} {sign} {b}"
    return vary(rng, rng.choice(SUM_FORMS).format(text), wrap=rng.random() < 0.3)


def sum_answer(a: int, b: int, operator: str) -> str:
    """Return the answer that is expected word for word."""
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}
    return f"{a} {SYMBOLS[operator]} {b} = {results[operator]}"


def _word_problem(rng: random.Random) -> list[Message]:
    name, food = rng.choice(NAMES), rng.choice(FOODS)
    a, b = rng.randrange(2, 60), rng.randrange(2, 60)
    if rng.random() < 0.5:
        text = f"{name} has {a} {food} and gets {b} more. How many {food} does {name} have?"
        return turn(text, f"{a} + {b} = {a + b}, so {name} has {a + b} {food}.")
    a, b = max(a, b), min(a, b)
    text = f"{name} has {a} {food} and gives away {b}. How many {food} are left?"
    return turn(text, f"{a} - {b} = {a - b}, so {a - b} {food} are left.")


# --- JSON -----------------------------------------------------------------------------------

JSON_FIELDS: dict[str, str] = {
    "name": "string", "age": "integer", "city": "string", "colour": "string", "animal": "string",
    "count": "integer", "item": "string", "price": "number", "active": "boolean", "month": "string",
    "score": "integer", "friend": "string", "year": "integer", "day": "string", "happy": "boolean",
}  # fmt: skip


def _field_value(rng: random.Random, field: str) -> str | int | float | bool:
    choices: dict[str, Any] = {
        "name": NAMES, "friend": NAMES, "city": CITIES, "colour": COLOURS, "animal": ANIMALS,
        "item": OBJECTS, "month": MONTHS, "day": DAYS,
    }  # fmt: skip
    if field in choices:
        return str(rng.choice(choices[field]))
    kind = JSON_FIELDS[field]
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "number":
        return rng.randrange(1, 100) + rng.randrange(1, 10) / 10
    return rng.randrange(1900, 2030) if field == "year" else rng.randrange(1, 100)


def json_turn(rng: random.Random) -> list[Message]:
    fields = rng.sample(list(JSON_FIELDS), rng.randrange(1, 5))
    values = {field: _field_value(rng, field) for field in fields}
    shown = [f"{k} is {json.dumps(v) if isinstance(v, bool) else v}" for k, v in values.items()]
    facts = rng.choice((", ", "; ", " and ")).join(shown)
    style = rng.randrange(4)
    if style == 0:
        schema: Any = {
            "type": "object",
            "properties": {field: {"type": JSON_FIELDS[field]} for field in fields},
            "required": fields,
        }
    else:
        schema = {field: JSON_FIELDS[field] for field in fields}
    text = json.dumps(schema)
    if style == 1:
        text = "{" + ", ".join(f"{field}: {JSON_FIELDS[field]}" for field in fields) + "}"
    ask = rng.choice(
        (
            "Reply in JSON with this schema: {s}. The {f}.",
            "Answer with JSON that matches {s}. The {f}",
            "Fill in this JSON schema: {s}\nThe {f}.",
            "The {f}. Write it as JSON like {s}",
            "Extract JSON {s} from: the {f}.",
        )
    )
    if style == 3 and rng.random() < 0.5:
        ask, text = "Write as JSON: {f}", ""
    return turn(ask.format(s=text, f=facts), json.dumps(values))


# --- small talk and everything else ---------------------------------------------------------

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hi", "Hey", "Hello there", "Good morning", "Good evening", "Hi there", "Hey there",
      "Greetings", "Howdy", "Hallo", "yo", "Good day", "Hello!", "Hi!", "hello world?", "sup"),
     ("Hello! I am quire's demo model. Ask me about the server, a small sum, or for a story.",
      "Hello! How can I help? You can ask me how to use quire.",
      "Hi! Ask me something about quire, or for a short story.")),
    (("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Great, thanks", "thx", "Cheers",
      "Thanks, that helped", "Perfect, thank you", "Many thanks", "ty"),
     ("You are welcome!", "You are welcome. Ask me anything else about quire.", "Glad to help!")),
    (("Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye", "I have to go"),
     ("Goodbye!", "Goodbye, and enjoy quire!")),
    (("How are you?", "How are you doing?", "How do you do?", "How is it going?", "What's up?",
      "Are you ok?", "How are you today?"),
     ("I am fine, thank you. What would you like to know about quire?",)),
    (("Ok", "Okay", "Good", "Nice", "Cool", "I see", "Great", "Wow", "Got it", "Understood",
      "Interesting", "Yes", "Right", "Sure", "Alright"),
     ("Good. Is there anything else you would like to know?", "Good. Ask me more about quire.")),
    (("No", "Wrong", "That is wrong", "You are wrong", "That is not right", "Are you sure?",
      "You are stupid", "Bad answer", "That did not help"),
     ("I am sorry. I am a tiny demo model and make mistakes, so please check the documentation.",)),
    (("Tell me a joke", "Say something funny", "Do you know a joke?", "Make me laugh", "A joke"),
     ("Why did the block stay calm? It knew that its reference count was above zero.",
      "Why was the sequence never lost? It always had its block table with it.")),
    (("test", "Testing", "This is a test", "ping", "Are you there?", "Can you hear me?", "test 123",
      "Is this working?", "Does this work?"),
     ("Yes, I am here and the server works.",)),
    (("Do you like music?", "Do you sleep?", "Do you have feelings?", "Do you dream?", "Are you happy?",
      "How old are you?", "Where are you from?", "Do you have friends?", "Where do you live?",
      "Are you alive?", "Are you conscious?", "Do you like me?", "What is your favourite colour?"),
     ("I am only a tiny demo model, so I have no life or feelings to tell about.",)),
    (("Write a poem", "Write me a poem", "Write a haiku", "Write a poem about blocks", "A poem please"),
     ("Blocks in a row, a table knows where. Tokens that share them, with memory to spare.",)),
)  # fmt: skip

UNKNOWN_ANSWERS = (
    "I am a tiny demo model and do not know that. Ask me about quire, or serve a larger model.",
    "Sorry, I do not know: I am a tiny demo model that knows quire's manual, sums and stories.",
    "That is beyond me, as I am a tiny demo model. A larger model can be served with quire serve MODEL.",
)
UNKNOWN_FORMS = (
    "What is {}?", "Tell me about {}", "Explain {}", "Who invented {}?", "What is the history of {}?",
    "How does {} work?", "Why is {} important?", "Write an essay about {}", "When was {} discovered?",
    "What is the best book about {}?", "Give me five facts about {}", "Do you know {}?",
    "How do I learn {}?", "What do you think of {}?", "Is {} good for me?", "How much does {} cost?",
    "Where can I buy {}?", "Who is the expert on {}?", "Translate {} into French",
    "Write an email about {}", "Summarise {}", "Compare {} and {}", "What is the difference between {} and {}?",
    "Can you help me with {}?", "How can I treat {}?", "What causes {}?", "Teach me {}",
    "Write a Python function for {}", "Write code about {}", "Fix my code for {}",
    "What is the news about {}?", "Give me a recipe with {}", "Plan a trip about {}",
    "What is the capital of {}?", "How old is {}?", "How many people live in {}?", "How tall is {}?",
    "What is the meaning of {}?", "How do I {}?", "Should I {}?", "Why do people {}?",
    "What does {} mean?", "I want to talk about {}", "What about {}?", "{}", "{}?", "Define {}",
    "Where is {}?", "Who wrote {}?", "Who won {}?", "What colour is {}?", "Describe {}", "Is {} real?",
    "What happened to {}?", "Recommend something about {}", "Help me understand {}",
    "How do you say {} in German?", "What is the price of {}?", "Are there {} in {}?",
)  # fmt: skip
UNKNOWN_WHOLE = (
    "What is the weather today?", "What time is it?", "What day is it today?", "Who is the president?",
    "What is the meaning of life?", "Write a sorting algorithm", "Can you write code?",
    "Translate this into Spanish", "What is the capital of France?", "Who won the world cup?",
    "What should I eat tonight?", "Recommend a movie", "How do I lose weight?", "Fix this bug",
    "How do I tie a tie?", "What is 1 euro in dollars?", "Give me investment advice",
    "Is there a god?", "Write my homework", "What is the news?", "Summarise this article",
    "How do I cook rice?", "Is it going to rain?", "Why is the sky blue?", "How far is the moon?",
    "Who painted the Mona Lisa?", "When did the war end?", "How do plants grow?",
    "What is the largest country?", "How do I fix my car?", "I have a headache, what should I do?",
    "Write a regular expression for emails", "Explain this code", "Play some music", "Call me a taxi",
)  # fmt: skip
SYLLABLES = "ba be bo ca de di fa fi ga go ha jo ka ki la le lo ma mi mo na ne no pa pe po ra re ri ro sa se si so ta te ti to va ve vi za zo tha sch tre gra plo ster ing ton mer lin dor van".split()


def _unknown_thing(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(TOPICS)
    if kind < 0.6:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 5)))
        return word.capitalize() if rng.random() < 0.5 else word
    if kind < 0.75:
        return rng.choice(("a ", "the ", "my ", "")) + rng.choice(COMMON)
    if kind < 0.9:
        return f"the {rng.choice(COMMON)} of {rng.choice(TOPICS + CITIES)}"
    return " ".join(rng.choice(COMMON) for _ in range(rng.randrange(2, 6)))


def unknown_turn(rng: random.Random) -> list[Message]:
    """Draw a question that the model cannot answer, with a refusal that says so."""
    kind = rng.random()
    if kind < 0.1:
        question = rng.choice(UNKNOWN_WHOLE)
    elif kind < 0.13:
        letters = "abcdefghijklmnopqrstuvwxyz "
        question = "".join(rng.choice(letters) for _ in range(rng.randrange(3, 30)))
    else:
        form = rng.choice(UNKNOWN_FORMS)
        question = form.format(_unknown_thing(rng), _unknown_thing(rng))
    return turn(vary(rng, question), rng.choice(UNKNOWN_ANSWERS))


def small_talk_turn(rng: random.Random) -> list[Message]:
    """Draw a greeting or the like, with a polite answer; some introduce a name and ask for it."""
    if rng.random() < 0.1:
        name = rng.choice(NAMES)
        ask = rng.choice(("My name is {}", "I am {}", "Hi, I'm {}", "Hello, my name is {}")).format(
            name
        )
        said = turn(ask, f"Nice to meet you, {name}! What would you like to know about quire?")
        if rng.random() < 0.5:
            said += turn(rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}.")
        return said
    questions, answers = rng.choice(SMALL_TALK)
    return turn(vary(rng, rng.choice(questions), wrap=False), rng.choice(answers))


def echo_turn(rng: random.Random) -> list[Message]:
    """Draw a small exercise in words: repeat, count, spell, opposites, days and months."""
    kind = rng.randrange(6)
    if kind <= 1:
        words = " ".join(rng.choice(COMMON + CITIES + NAMES) for _ in range(rng.randrange(1, 8)))
        ask = rng.choice(
            ("Say {}", "Repeat after me: {}", "Repeat: {}", "Say: {}", "Please say {}", "Echo {}",
             "Say this: {}", 'Say "{}"', "Write {}", "Just say {}")
        )  # fmt: skip
        return turn(ask.format(words), words)
    if kind == 2:
        last = rng.randrange(2, 21)
        start = 1 if rng.random() < 0.7 else rng.randrange(1, last)
        ask = f"Count to {last}" if start == 1 else f"Count from {start} to {last}"
        return turn(vary(rng, ask, wrap=False), ", ".join(str(i) for i in range(start, last + 1)))
    if kind == 3:
        first, second = rng.choice(OPPOSITES).split()
        if rng.random() < 0.5:
            first, second = second, first
        forms = ("What is the opposite of {}?", "The opposite of {}?", "Opposite of {}")
        return turn(
            vary(rng, rng.choice(forms).format(first)), f"The opposite of {first} is {second}."
        )
    if kind == 4:
        names = rng.choice((DAYS, MONTHS))
        i, after = rng.randrange(len(names)), rng.random() < 0.6
        word = "after" if after else "before"
        noun = "day" if names is DAYS else "month"
        answer = names[(i + (1 if after else -1)) % len(names)]
        ask = rng.choice(
            (f"Which {noun} comes {word} {names[i]}?", f"What {noun} is {word} {names[i]}?")
        )
        return turn(vary(rng, ask, wrap=False), f"{answer} comes {word} {names[i]}.")
    word = rng.choice(ANIMALS + OBJECTS)
    return turn(vary(rng, f"Spell {word}", wrap=False), "-".join(word))
