"""Constrained sequences through a whole engine: a tiny random model with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from quire.engine.config import EngineConfig
from quire.engine.engine_core import EngineCore
from quire.engine.outputs import SequenceOutput
from quire.engine.request import GrammarSpec, Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.worker import Worker

from .models import COMMON, LlamaConfig, build_model

DEMO = Path(__file__).resolve().parents[2] / "configs/demo"
VOCAB_SIZE = 1600  # padded beyond the tokenizer's 1536, as vocabularies are
EOS, END_OF_TEXT = 2, 0
PROMPT = list(range(300, 330))


def obj(required: int | None = None, **properties: Any) -> dict[str, Any]:
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
    obj(),
    obj(name=WORD, age=INTEGER),
    obj(1, name=WORD, nick=WORD),
    obj(0, a={"type": "boolean"}, b={"type": "null"}),
    obj(user=obj(id=INTEGER, tags={"type": "array", "items": WORD, "maxItems": 2})),
    {"anyOf": [INTEGER, WORD]},
    {"oneOf": [obj(kind={"const": "a"}, x=INTEGER), obj(kind={"const": "b"}, y=WORD)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30}]},
    {"$defs": {"w": WORD}, "type": "array", "items": {"$ref": "#/$defs/w"}, "maxItems": 3},
    {
        "$defs": {"node": obj(1, value=INTEGER, next={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("constrained")
    sizes = COMMON | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None}
    build_model(LlamaConfig(**sizes | {"max_position_embeddings": 512})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def make_core(folder: Path, **fields: Any) -> EngineCore:
    torch.set_num_threads(1)
    config = EngineConfig(
        model=str(folder), device="cpu", num_threads=1, **{"num_blocks": 256, **fields}
    )
    return EngineCore(config, Worker(config))


@pytest.fixture(scope="module")
def core(folder: Path) -> EngineCore:
    return make_core(folder, max_num_seqs=64)


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
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.final: SequenceOutput | None = None

    @property
    def reason(self) -> str | None:
        return self.final.finish_reason if self.final else None

    @property
    def text(self) -> str:
        return str(TOKENIZER.decode(self.token_ids))


TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def run(core: EngineCore, requests: Iterable[Request]) -> dict[tuple[str, int], Answer]:
    """All choices to their ends, by (request id, choice)."""
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


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_thirty_schemas_are_kept(core: EngineCore, temperature: float) -> None:
    requests = [
        make_request(str(number), json_spec(schema), temperature=temperature, n=3)
        for number, schema in enumerate(SCHEMAS)
    ]
    answers = run(core, requests)
    assert len(answers) == 3 * len(SCHEMAS) == 90
    complete = 0
    for (name, _), answer in answers.items():
        if answer.reason == "length":
            continue
        assert answer.reason == "stop", answer.final
        jsonschema.validate(
            json.loads(answer.text),
            SCHEMAS[int(name)],
            format_checker=jsonschema.FormatChecker(),
        )
        complete += 1
    assert complete > 75
