"""Constrained requests to a tiny random model with a real tokenizer, and their answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.outputs import SequenceOutput
from quire.engine.request import GrammarSpec, Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

DEMO = Path(__file__).resolve().parents[3] / "configs/demo"
VOCAB_SIZE = 1600  # padded beyond the tokenizer's 1536, as vocabularies often are
EOS, END_OF_TEXT = 2, 0
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
PROMPT = list(range(300, 330))


def record(required: int | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": names[:required],
        "additionalProperties": False,
    }


INTEGER = {"type": "integer", "minimum": -99, "maximum": 9999}
WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, "two"]}},
    {"enum": ["red", "green", 3, None]},
    INTEGER,
    {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number", "minimum": 0.5, "maximum": 2.5},
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 3, "maxLength": 5},
    WORD,
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 50},
    {"type": "array", "items": INTEGER, "maxItems": 4},
    {"type": "array", "items": WORD, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [WORD, INTEGER], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 2},
    record(),
    record(name=WORD, age=INTEGER),
    record(1, name=WORD, nick=WORD),
    record(0, a={"type": "boolean"}, b={"type": "null"}),
    record(user=record(id=INTEGER, tags={"type": "array", "items": WORD, "maxItems": 2})),
    {"anyOf": [INTEGER, WORD]},
    {
        "oneOf": [
            record(kind={"const": "a"}, x=INTEGER),
            record(kind={"const": "b"}, y=WORD),
        ]
    },
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30}]},
    {"$defs": {"w": WORD}, "type": "array", "items": {"$ref": "#/$defs/w"}, "maxItems": 3},
    {
        "$defs": {"node": record(1, value=INTEGER, next={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 2},
]


def make_core(folder: Path, **fields: Any) -> EngineCore:
    torch.set_num_threads(1)
    config = EngineConfig(
        model=str(folder), device="cpu", num_threads=1, **{"num_blocks": 256, **fields}
    )
    return EngineCore(config, Worker(config))


def make_request(name: str, spec: GrammarSpec | None, **params: Any) -> Request:
    params = {"max_tokens": 100, "seed": 5, **params}
    return Request(
        request_id=name,
        prompt_token_ids=tuple(PROMPT),
        sampling_params=SamplingParams(**params),
        arrival_time=0.0,
        grammar=spec,
    )


class Answer:
    """The tokens of one choice so far, and its last output."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.final: SequenceOutput | None = None

    @property
    def reason(self) -> str | None:
        return self.final.finish_reason if self.final else None

    @property
    def text(self) -> str:
        return str(TOKENIZER.decode(self.token_ids))


def run(core: EngineCore, requests: Iterable[Request]) -> dict[tuple[str, int], Answer]:
    """Run all choices to their ends and return the answers by (request id, choice)."""
    answers: dict[tuple[str, int], Answer] = defaultdict(Answer)
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step().outputs:
            answer = answers[output.request_id, output.choice]
            answer.token_ids += output.token_ids
            if output.finish_reason:
                answer.final = output
    assert core.stats().num_running == core.stats().num_waiting == 0
    return answers


def json_spec(schema: Any) -> GrammarSpec:
    return GrammarSpec("json", json.dumps(schema))


GRAMMARS: dict[str, tuple[GrammarSpec, str]] = {
    "regex": (GrammarSpec("regex", "[a-f]{3}-[0-9]{2,4}"), "[a-f]{3}-[0-9]{2,4}"),
    "choice": (GrammarSpec("choice", '["yes", "no", "né/\\"x\\""]'), 'yes|no|né/"x"'),
    "lark": (
        GrammarSpec("grammar", 'start: "(" item ("," item)? ")"\nitem: /[a-z]{1,3}/ | start'),
        r"\([a-z(),]+\)",
    ),
    "gbnf": (GrammarSpec("grammar", 'root ::= "a" | "b" [0-9]'), "a|b[0-9]"),
}
"""Grammars that are not JSON schemas, each with a regular expression of its complete answers."""
