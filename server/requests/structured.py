"""`response_format` and `structured_outputs`: the structure that an answer must have, as a grammar.

Sizes are checked here, before a grammar is compiled on trial (grammar_check.py); the nesting of
every body is checked when it is parsed (body.py). Nothing that a schema refers to is ever fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from ...engine.errors import InvalidRequestError
from ...engine.request import GrammarSpec
from ..http.body import parse_json_object
from ..http.middleware import connection
from ..http.sse import while_connected
from ..json_text import encode_json
from .protocol import GenerationBody
from .state import ServerState

MAX_GRAMMAR_BYTES = 64 * 1024
"""Maximum size of a schema, a grammar, all choices, or all structural tags."""
MAX_REGEX_BYTES = 8 * 1024
"""Maximum size of a regular expression, or of a string in a structural tag."""
MAX_CHOICES = 1024
"""Maximum strings of a choice, or values of an enum."""
MAX_TAGS = 64
"""Maximum triggers, and maximum structures, of a structural tag."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KINDS = ("json", "regex", "choice", "grammar")


class Constraint(NamedTuple):
    """A grammar and the parameter that is at fault if it does not compile."""

    spec: GrammarSpec
    param: str
    part: Constraint | None = None
    """A part of the grammar that another parameter asked for. It is compiled first."""
    call_openings: tuple[str, ...] = ()
    """The texts with which calls begin, if the grammar also allows an answer without calls."""


async def try_out(state: ServerState, constraint: Constraint | None) -> GrammarSpec | None:
    """Return the grammar of a constraint after compiling it on trial, or None without one.

    Raises InvalidRequestError naming the parameter if the grammar does not compile in time,
    QueueFullError if too many wait to be compiled, and ClientDisconnect if the client leaves.
    """
    if constraint is None:
        return None
    await try_out(state, constraint.part)
    info = state.engine.info
    here = connection.get()
    await while_connected(
        state.grammar_check.check(
            constraint.spec,
            constraint.param,
            read_tokenizer=state.tokenizer.backend.to_str,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            caller=None if here is None else here.caller,
        )
    )
    return constraint.spec


def read_constraint(body: GenerationBody) -> Constraint | None:
    """Return the structure that a body asks for, or None if it asks for none. Raises
    InvalidRequestError naming the parameter."""
    found = None
    if body.response_format is not None:
        found = _response_format(body.response_format)
    if body.structured_outputs is not None:
        if found is not None:
            _refuse("structured_outputs", "response_format already asks for a structure")
        found = _structured_outputs(body.structured_outputs)
    for name in ("allowed_token_ids", "bad_words"):
        if found is not None and getattr(body, name):
            _refuse(name, f"{found.param} decides which tokens are allowed")
    return found


def _response_format(fields: dict[str, Any]) -> Constraint | None:
    param = "response_format"
    match fields.get("type"):
        case "text":
            _only(fields, param, "type")
            return None
        case "json_object":
            _only(fields, param, "type")
            return Constraint(GrammarSpec("json", '{"type":"object"}'), param)
        case "json_schema":
            _only(fields, param, "type", "json_schema")
            return _json_schema(fields.get("json_schema"), f"{param}.json_schema")
        case "structural_tag":
            _only(fields, param, "type", "triggers", "structures")
            return Constraint(_structural_tag(fields, param), param)
    _refuse(f"{param}.type", "must be text, json_object, json_schema or structural_tag")


def _json_schema(fields: Any, param: str) -> Constraint:
    if not isinstance(fields, dict):
        _refuse(param, "must be an object with name and schema")
    _only(fields, param, "name", "description", "schema", "strict")
    name = fields.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{param}.name", "must be 1 to 64 letters, digits, _ and -")
    if not isinstance(fields.get("description"), str | None):
        _refuse(f"{param}.description", "must be a string")
    if not isinstance(fields.get("strict"), bool | None):
        _refuse(f"{param}.strict", "must be true or false")
    return Constraint(_schema(fields.get("schema"), f"{param}.schema"), f"{param}.schema")


def _structured_outputs(fields: dict[str, Any]) -> Constraint:
    param = "structured_outputs"
    _only(fields, param, *_KINDS)
    given = [kind for kind in _KINDS if fields.get(kind) is not None]
    if len(given) != 1:
        _refuse(param, f"needs exactly one of {', '.join(_KINDS)}")
    [kind] = given
    value = fields[kind]
    param = f"{param}.{kind}"
    match kind:
        case "json":
            if isinstance(value, str):
                value = _parse(value, param)
            spec = _schema(value, param)
        case "regex":
            spec = GrammarSpec("regex", _text(value, param, MAX_REGEX_BYTES))
        case "grammar":
            spec = GrammarSpec("grammar", _text(value, param, MAX_GRAMMAR_BYTES))
        case _:
            if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
                _refuse(param, f"must be a list of 1 to {MAX_CHOICES} strings")
            if not all(isinstance(choice, str) and choice for choice in value):
                _refuse(param, "must be a list of non-empty strings")
            spec = GrammarSpec("choice", _encode(value, param))
    return Constraint(spec, param)


def _structural_tag(fields: dict[str, Any], param: str) -> GrammarSpec:
    # 1. Check the two lists and their items.
    triggers, structures = fields.get("triggers"), fields.get("structures")
    for name, value in (("triggers", triggers), ("structures", structures)):
        if not isinstance(value, list) or not 0 < len(value) <= MAX_TAGS:
            _refuse(f"{param}.{name}", f"must be a list of 1 to {MAX_TAGS} items")
    for index, trigger in enumerate(triggers or ()):
        _text(trigger, f"{param}.triggers[{index}]", MAX_REGEX_BYTES)
    for index, structure in enumerate(structures or ()):
        path = f"{param}.structures[{index}]"
        if not isinstance(structure, dict):
            _refuse(path, "must be an object with begin, schema and end")
        _only(structure, path, "begin", "schema", "end")
        begin = _text(structure.get("begin"), f"{path}.begin", MAX_REGEX_BYTES)
        if not isinstance(structure.get("end"), str):
            _refuse(f"{path}.end", "must be a string")
        _schema(structure.get("schema"), f"{path}.schema")
        # 2. Each structure must have one trigger: it could not be reached without one, and with
        #    several the grammar would be ambiguous.
        if sum(begin.startswith(trigger) for trigger in triggers or ()) != 1:
            _refuse(f"{path}.begin", "must begin with exactly one of the triggers")
    # 3. Each trigger must begin a structure, or the text could not go on after it.
    for index, trigger in enumerate(triggers or ()):
        if not any(structure["begin"].startswith(trigger) for structure in structures or ()):
            _refuse(f"{param}.triggers[{index}]", "no structure begins with it")
    return GrammarSpec(
        "structural_tag", _encode({"triggers": triggers, "structures": structures}, param)
    )


def _schema(value: Any, param: str) -> GrammarSpec:
    """Return the grammar of a JSON schema within bounds. Raises InvalidRequestError."""
    if not isinstance(value, dict):
        _refuse(param, "must be a JSON schema, as an object")
    text = _encode(value, param)
    for values in _enums(value):
        if len(values) > MAX_CHOICES:
            _refuse(param, f"an enum has more than {MAX_CHOICES} values")
    return GrammarSpec("json", text)


def _enums(value: Any) -> Iterator[list[Any]]:
    """Yield the values of every `enum` in a JSON schema."""
    if isinstance(value, dict):
        if isinstance(value.get("enum"), list):
            yield value["enum"]
        for item in value.values():
            yield from _enums(item)
    elif isinstance(value, list):
        for item in value:
            yield from _enums(item)


def _parse(text: str, param: str) -> dict[str, Any]:
    """Parse the text of a JSON schema. Raises InvalidRequestError."""
    try:
        return parse_json_object(_text(text, param, MAX_GRAMMAR_BYTES).encode())
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{param}: {error.message}", param) from error


def _encode(value: Any, param: str) -> str:
    """Return the JSON text of a value. Raises InvalidRequestError if it is too long."""
    data = encode_json(value)
    if len(data) > MAX_GRAMMAR_BYTES:
        _refuse(param, f"is longer than {MAX_GRAMMAR_BYTES} bytes")
    return data.decode()


def _text(value: Any, param: str, max_bytes: int) -> str:
    """Return `value` if it is a non-empty string of at most `max_bytes`. Raises
    InvalidRequestError."""
    if not isinstance(value, str) or not value:
        _refuse(param, "must be a non-empty string")
    if len(value) > max_bytes or len(value.encode()) > max_bytes:
        _refuse(param, f"is longer than {max_bytes} bytes")
    return value


def _only(fields: dict[str, Any], param: str, *names: str) -> None:
    """Raise InvalidRequestError if `fields` has others than `names`."""
    for name in fields.keys() - set(names):
        shown = name if _NAME.fullmatch(name) else "?"
        _refuse(f"{param}.{shown}", "is not a known field")


def _refuse(param: str, reason: str) -> NoReturn:
    raise InvalidRequestError(f"{param}: {reason}", param)
