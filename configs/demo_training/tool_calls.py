"""Conversations in which the model calls one of the tools that it is offered."""

# ruff: noqa: E501  (the table of tools reads best as packed lines)

from __future__ import annotations

import json
import random
from typing import Any

from manual import vary
from skills import Message
from words import CITIES, COLOURS, COMMON, DAYS, NAMES, OBJECTS, TOPICS

Tool = tuple[str, str, dict[str, str], tuple[str, ...], str, str]
"""Name, description, kind of each parameter, ways to ask, key of the result, form of the report."""
TOOLS: tuple[Tool, ...] = (
    ("get_weather", "Get the weather of a city", {"city": "city"},
     ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}",
      "Is it raining in {city}?", "Tell me the weather in {city}", "Is it warm in {city} today?"),
     "weather", "The weather in {city} is {result}."),
    ("get_temperature", "Get the temperature of a city", {"city": "city"},
     ("What is the temperature in {city}?", "How warm is it in {city}?", "How cold is it in {city}?"),
     "temperature", "It is {result} degrees in {city}."),
    ("get_time", "Get the current time in a city", {"city": "city"},
     ("What time is it in {city}?", "Tell me the time in {city}", "Current time in {city}"),
     "time", "It is {result} in {city}."),
    ("add", "Add two numbers", {"a": "integer", "b": "integer"},
     ("Add {a} and {b}", "What is {a} + {b}?", "Use the tool to add {a} and {b}"),
     "sum", "The sum is {result}."),
    ("multiply", "Multiply two numbers", {"a": "integer", "b": "integer"},
     ("Multiply {a} by {b}", "What is {a} times {b}?"), "product", "The product is {result}."),
    ("send_message", "Send a message to a person", {"to": "name", "text": "words"},
     ("Send a message to {to}: {text}", "Write to {to}: {text}", "Tell {to} this: {text}"),
     "status", "The message to {to} was sent."),
    ("set_timer", "Set a timer", {"minutes": "integer"},
     ("Set a timer for {minutes} minutes", "Wake me in {minutes} minutes",
      "Start a {minutes} minute timer"), "status", "The timer is set to {minutes} minutes."),
    ("search", "Search the web", {"query": "topic"},
     ("Search for {query}", "Look up {query}", "Find something about {query}",
      "Search the web for {query}"), "result", "I found: {result}"),
    ("get_user", "Get a user's data", {"name": "name"},
     ("Who is the user {name}?", "Look up the user {name}", "Get the data of {name}"),
     "email", "The email of {name} is {result}."),
    ("set_light", "Change the light of a room", {"room": "word", "colour": "colour"},
     ("Make the light in the {room} {colour}", "Set the {room} light to {colour}"),
     "status", "The light in the {room} is now {colour}."),
    ("book_train", "Book a train", {"origin": "city", "destination": "city", "day": "day"},
     ("Book a train from {origin} to {destination} on {day}",
      "I need a train from {origin} to {destination} on {day}"),
     "price", "The train from {origin} to {destination} costs {result} euros."),
    ("add_item", "Add an item to a list", {"item": "object", "count": "integer"},
     ("Put {count} of {item} on my list", "Add {count} {item} to the list"),
     "status", "I put {count} {item} on the list."),
)  # fmt: skip
PRIMARY = {
    "get_weather", "get_temperature", "get_time", "send_message", "set_timer", "search", "get_user",
}  # fmt: skip


def _draw(rng: random.Random, kind: str) -> str | int:
    """Draw an argument of this kind."""
    if kind == "integer":
        return rng.randrange(1, 1000)
    if kind == "words":
        return " ".join(rng.choice(COMMON) for _ in range(rng.randrange(2, 5)))
    lists: dict[str, Any] = {
        "city": CITIES, "name": NAMES, "colour": COLOURS, "day": DAYS, "object": OBJECTS,
        "topic": TOPICS, "word": COMMON,
    }  # fmt: skip
    return str(rng.choice(lists[kind]))


def _result(rng: random.Random, key: str, arguments: dict[str, Any]) -> Any:
    """Make up what a tool returns."""
    if key == "sum":
        return arguments["a"] + arguments["b"]
    if key == "product":
        return arguments["a"] * arguments["b"]
    if key in ("temperature", "price"):
        return rng.randrange(1, 200)
    if key == "time":
        return f"{rng.randrange(24)}:{rng.randrange(60):02d}"
    if key == "weather":
        return rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "clear"))
    if key == "email":
        return f"{arguments['name'].lower()}@example.com"
    return "ok" if key == "status" else " ".join(rng.choice(COMMON) for _ in range(4))


def tool_schema(rng: random.Random, tool: Tool) -> dict[str, Any]:
    """Describe a tool as a request of OpenAI's API does, in one of the usual variants."""
    name, description, parameters, *_ = tool
    properties: dict[str, Any] = {
        p: {"type": "integer" if kind == "integer" else "string"} for p, kind in parameters.items()
    }
    if rng.random() < 0.4:
        for p in properties:
            properties[p]["description"] = f"The {p}"
    function: dict[str, Any] = {"name": name, "description": description}
    if rng.random() < 0.2:
        del function["description"]
    function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        function["parameters"]["required"] = list(parameters)
    return {"type": "function", "function": function}


def tool_turn(rng: random.Random) -> tuple[list[Message], list[dict[str, Any]]]:
    """Draw a call of one of the offered tools, often with its result and the final answer.

    Returns the messages and the schemas of the offered tools.
    """
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2, 2, 3, 4)))
    name, _, parameters, forms, key, report = chosen = rng.choice(offered)
    schemas = [tool_schema(rng, tool) for tool in offered]
    if rng.random() < 0.25:  # a new name, which the model must read from the schema
        name = rng.choice(COMMON) + "_" + rng.choice(COMMON)
        schemas[offered.index(chosen)]["function"]["name"] = name
    arguments = {p: _draw(rng, kind) for p, kind in parameters.items()}
    ask = vary(rng, rng.choice(forms).format(**arguments), wrap=False)
    if any(isinstance(v, str) and v not in ask for v in arguments.values()):
        ask = rng.choice(forms).format(**arguments)
    messages: list[Message] = [{"role": "user", "content": ask}]
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    if rng.random() < 0.6:
        result = _result(rng, key, arguments)
        content = json.dumps({key: result}) if rng.random() < 0.7 else str(result)
        messages.append({"role": "tool", "content": content})
        messages.append({"role": "assistant", "content": report.format(result=result, **arguments)})
    return messages, schemas
