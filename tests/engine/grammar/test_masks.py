"""Constrained sequences through a whole engine: a tiny random model with a real tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import GrammarError, InvalidRequestError, error_from_code
from quire.engine.grammar import compile as grammar
from quire.engine.grammar import masks as structured_output
from quire.engine.grammar.constraints import NOTHING_PENDING, start_constraints
from quire.engine.grammar.masks import StructuredOutput
from quire.engine.outputs import SequenceOutput
from quire.engine.request import GrammarSpec, Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Rank, Sequence, SequenceStatus

from ..models import COMMON, build_model

DEMO = Path(__file__).resolve().parents[3] / "configs/demo"
VOCAB_SIZE = 1600  # padded beyond the tokenizer's 1536, as vocabularies often are
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
    """Return the folder of a model with random weights and the demo's tokenizer."""
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


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_answers_follow_thirty_schemas(core: EngineCore, temperature: float) -> None:
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


OTHERS: dict[str, tuple[GrammarSpec, str]] = {
    "regex": (GrammarSpec("regex", "[a-f]{3}-[0-9]{2,4}"), "[a-f]{3}-[0-9]{2,4}"),
    "choice": (GrammarSpec("choice", '["yes", "no", "né/\\"x\\""]'), 'yes|no|né/"x"'),
    "lark": (
        GrammarSpec("grammar", 'start: "(" item ("," item)? ")"\nitem: /[a-z]{1,3}/ | start'),
        r"\([a-z(),]+\)",
    ),
    "gbnf": (GrammarSpec("grammar", 'root ::= "a" | "b" [0-9]'), "a|b[0-9]"),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_answers_follow_other_grammars(core: EngineCore, temperature: float) -> None:
    requests = [
        make_request(name, spec, temperature=temperature, n=3) for name, (spec, _) in OTHERS.items()
    ]
    complete = set()
    for (name, _), answer in run(core, requests).items():
        if answer.reason == "stop":
            assert re.fullmatch(OTHERS[name][1], answer.text), (name, answer.text)
            complete.add(name)
        else:
            assert (name, answer.reason) == ("lark", "length")
    assert complete == set(OTHERS)


def test_structural_tags_leave_text_free_and_enforce_their_schemas(core: EngineCore) -> None:
    tags = {
        "triggers": ["{"],
        "structures": [{"begin": "{{n=", "schema": INTEGER, "end": "}}"}],
    }
    spec = GrammarSpec("structural_tag", json.dumps(tags))
    # A logit bias towards "{" makes the random model spell the trigger.
    brace = TOKENIZER.token_to_id("{")
    answers = run(core, [make_request("t", spec, n=6, logit_bias=((brace, 8.0),), ignore_eos=True)])
    texts = [answer.text for answer in answers.values()]
    calls = [call for text in texts for call in re.findall(r"\{.{0,12}", text) if len(call) == 13]
    assert len(calls) > 10
    for call in calls:
        assert re.match(r"\{\{n=-?[0-9]+\}\}", call), call


def test_answers_do_not_depend_on_other_rows(core: EngineCore) -> None:
    """Constrained and unconstrained requests give the same answers together and one by one."""
    specs = [None, json_spec(SCHEMAS[20]), None, OTHERS["regex"][0], json_spec(SCHEMAS[8])]
    requests = [make_request(str(i), spec, max_tokens=30) for i, spec in enumerate(specs)]
    together = run(core, requests)
    for request in requests:
        key = (request.request_id, 0)
        assert run(core, [request])[key].token_ids == together[key].token_ids


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_sequence_continues_where_it_stopped(
    folder: Path, core: EngineCore, ahead: bool
) -> None:
    spec = json_spec({"type": "array", "items": INTEGER, "minItems": 12, "maxItems": 20})
    requests = [make_request(str(i), spec, seed=i, n=3) for i in range(3)]
    calm = run(core, requests)
    small = make_core(folder, num_blocks=14, max_model_len=200, async_scheduling=ahead)
    stormy = run(small, requests)
    assert small.stats().preemptions > 5
    for key, answer in calm.items():
        assert answer.reason == stormy[key].reason == "stop"
        assert answer.token_ids == stormy[key].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_one_step_ahead_gives_the_same_tokens_in_at_most_two_more_steps(
    folder: Path, temperature: float
) -> None:
    """Run plain and constrained requests, bad words and a grammar that ends early.

    One step ahead, they get the same tokens in the same number of steps, except for up to two steps
    that were launched before an end was known.
    """
    specs = [None, json_spec(SCHEMAS[20]), None, json_spec(SCHEMAS[0]), json_spec(SCHEMAS[15])]
    requests = [
        make_request(str(i), spec, max_tokens=40, temperature=temperature, n=1 + i % 2)
        for i, spec in enumerate(specs)
    ]
    words = tuple((token,) for token in range(300, 550))
    requests.append(make_request("words", None, max_tokens=40, bad_words=words))
    answers, steps = [], []
    for ahead in (False, True):
        core = make_core(folder, max_num_seqs=16, async_scheduling=ahead)
        run(core, requests)  # compiles the grammars
        core.reset_prefix_cache()
        before = core.stats().step
        answers.append(run(core, requests))
        steps.append(core.stats().step - before)
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) == 8
    for key, answer in answers[0].items():
        assert (answer.token_ids, answer.reason) == (
            answers[1][key].token_ids,
            answers[1][key].reason,
        )
    assert {answer.reason for answer in answers[0].values()} == {"stop", "length"}
    assert 40 <= steps[0] <= steps[1] <= steps[0] + 2


def test_the_end_of_the_grammar_ends_the_answer(core: EngineCore) -> None:
    spec = GrammarSpec("regex", "(ab)+")
    cases: dict[str, dict[str, Any]] = {
        "ignore_eos": {"ignore_eos": True},
        "min_tokens": {"min_tokens": 9},
        "both": {"ignore_eos": True, "min_tokens": 30},
    }
    for name, params in cases.items():
        longer = run(core, [make_request(name, spec, max_tokens=40, n=4, **params)])
        for answer in longer.values():
            assert re.fullmatch("(ab)*a?", answer.text)
            assert len(answer.token_ids) >= (9 if name == "min_tokens" else 40)
        closed = GrammarSpec("choice", '["ab"]')  # nothing may follow
        for answer in run(core, [make_request(name, closed, max_tokens=40, **params)]).values():
            assert (answer.text, answer.reason) == ("ab", "stop")
            assert answer.token_ids[-1] == EOS


def test_whitespace_is_bounded(core: EngineCore) -> None:
    """A model that strongly prefers whitespace still finishes."""
    spaces = [t for t, i in TOKENIZER.get_vocab().items() if set(t) <= set("ĠĊ\t")]
    bias = tuple((TOKENIZER.token_to_id(space), 50.0) for space in spaces)
    spec = json_spec(obj(a=INTEGER, b={"type": "boolean"}))
    answers = run(core, [make_request("w", spec, n=3, logit_bias=bias, max_tokens=400)])
    for answer in answers.values():
        assert answer.reason == "stop"
        assert len(answer.text) > 20
        assert "\n\n" not in answer.text
        jsonschema.validate(json.loads(answer.text), obj(a=INTEGER, b={"type": "boolean"}))


# -- failures --------------------------------------------------------------------------------


def test_a_grammar_that_does_not_compile_fails_only_its_request(core: EngineCore) -> None:
    """The HTTP process refuses such grammars, but an engine that gets one must survive it."""
    bad = GrammarSpec("regex", "(a")
    answers = run(core, [make_request("bad", bad, n=2), make_request("good", OTHERS["regex"][0])])
    for choice in range(2):
        final = answers["bad", choice].final
        assert final is not None and final.error is not None
        assert (final.finish_reason, final.error.code) == ("error", "grammar_failed")
        assert isinstance(error_from_code(*final.error), GrammarError)
    assert answers["good", 0].reason == "stop"


def test_a_matcher_that_fails_ends_only_its_choice(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "victim"
    original = StructuredOutput._row

    def row(self: StructuredOutput, index: int, sequence: Sequence) -> Any:
        result = original(self, index, sequence)
        if sequence.choice == 1 and sequence.request.request_id == failing:
            # As if a token had been sampled that was not allowed.
            return result._replace(token_ids=result.token_ids and [END_OF_TEXT])
        return result

    monkeypatch.setattr(StructuredOutput, "_row", row)
    spec = OTHERS["regex"][0]
    answers = run(core, [make_request(failing, spec, n=3), make_request("other", spec)])
    reasons = {key: answer.reason for key, answer in answers.items()}
    assert reasons.pop((failing, 1)) == "error"
    assert set(reasons.values()) == {"stop"}
    assert len(answers[failing, 1].token_ids) == 1


def test_a_failure_outside_all_rows_ends_only_constrained_rows(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(matcher: Any) -> str:
        raise RuntimeError("borrowed")

    monkeypatch.setattr(structured_output, "matcher_failure", fail)
    requests = [make_request("c", OTHERS["regex"][0]), make_request("f", None, max_tokens=4)]
    answers = run(core, requests)
    final = answers["c", 0].final
    assert final is not None and final.error is not None
    assert final.error.code == "grammar_failed" and "borrowed" in final.error.message
    assert len(answers["f", 0].token_ids) == 4


def test_a_request_can_be_aborted_while_its_grammar_is_compiled(folder: Path) -> None:
    core = make_core(folder)
    core.add_request(make_request("a", OTHERS["regex"][0], n=2))
    core.abort_request("a")
    outputs = core.step().outputs
    assert [output.finish_reason for output in outputs] == ["abort", "abort"]
    assert not core.has_work
    assert not core._structured._requests


def test_other_requests_continue_while_a_grammar_is_compiled(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    original = grammar.compile_grammar

    def slow(tokenizer: Any, spec: GrammarSpec) -> Any:
        release.wait(20)
        return original(tokenizer, spec)

    monkeypatch.setattr(structured_output, "compile_grammar", slow)
    core.add_request(make_request("slow", GrammarSpec("regex", "[xyz]{4}")))
    core.add_request(make_request("plain", None, max_tokens=5, ignore_eos=True))
    outputs = [output for _ in range(8) for output in core.step().outputs]
    assert {output.request_id for output in outputs} == {"plain"}
    assert outputs[-1].finish_reason == "length"
    release.set()
    while core.has_work:
        outputs += core.step().outputs
    tokens = [t for o in outputs if o.request_id == "slow" for t in o.token_ids]
    assert re.fullmatch("[xyz]{4}", str(TOKENIZER.decode(tokens)))


def test_an_engine_that_cannot_constrain_says_so(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request("r", OTHERS["regex"][0])
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        StructuredOutput(VOCAB_SIZE, (), TOKENIZER.to_str).check(request)
    monkeypatch.setattr(structured_output, "is_available", lambda: False)
    with pytest.raises(InvalidRequestError, match="llguidance"):
        core.add_request(request)
    assert not core.has_work
    with pytest.raises(InvalidRequestError, match="beam"):
        make_request("b", OTHERS["regex"][0], beam_width=2, temperature=0.0)


def test_the_engine_imports_without_llguidance(tmp_path: Path) -> None:
    code = "import sys; sys.modules['llguidance'] = None; import quire.engine.core.engine_core"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)


# -- matchers, without an engine -------------------------------------------------------------


def step_of(*sequences: Sequence) -> list[tuple[int, Sequence]]:
    return list(enumerate(sequences))


def allowed(bits: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def make_structured(request: Request, vocab_size: int = VOCAB_SIZE) -> StructuredOutput:
    structured = StructuredOutput(vocab_size, (EOS, END_OF_TEXT), TOKENIZER.to_str)
    structured.add(request)
    while not structured.is_ready(request):
        structured.wait_compiled(1.0)
    return structured


def sequences_of(request: Request) -> list[Sequence]:
    return [
        Sequence(request, choice, 0, Rank(0, 0, choice), frozenset({EOS}))
        for choice in range(request.sampling_params.n)
    ]


def token(text: str) -> int:
    return TOKENIZER.get_vocab()[text]


def test_forks_have_their_own_matchers_and_a_new_one_catches_up() -> None:
    request = make_request("r", GrammarSpec("regex", "a1|b2"), n=2)
    structured = make_structured(request)
    first, second = sequences_of(request)
    masks = structured.start(step_of(first, second))
    assert masks is not None and masks.rows == {0: 0, 1: 1}
    for row in masks.wait():
        assert allowed(row) == {token("a"), token("b")}
    first.token_ids.append(token("a"))
    second.token_ids.append(token("b"))
    masks = structured.start(step_of(second, first))
    assert masks is not None
    assert [allowed(row) for row in masks.wait()] == [{token("2")}, {token("1")}]
    # The same step again, as after one that ran out of memory, with new matchers.
    structured._requests["r"].matchers.clear()
    masks = structured.start(step_of(second, first))
    assert masks is not None
    assert [allowed(row) for row in masks.wait()] == [{token("2")}, {token("1")}]
    first.token_ids.append(token("1"))
    masks = structured.start(step_of(first))
    assert masks is not None and allowed(masks.wait()[0]) == {EOS, END_OF_TEXT}


def test_only_unfinished_constrained_rows_have_a_mask() -> None:
    request = make_request("r", OTHERS["regex"][0])
    structured = make_structured(request)
    [constrained] = sequences_of(request)
    [plain] = sequences_of(make_request("p", None, bad_words=((4, 5),)))
    pending = start_constraints(structured, step_of(plain, constrained))
    constraints = pending.wait()
    assert constraints.mask_rows == [1] and not pending.errors
    assert len(constraints.bitmask) == VOCAB_SIZE // 8
    constrained.status = SequenceStatus.FINISHED  # by results during the forward
    assert start_constraints(structured, step_of(plain, constrained)) is NOTHING_PENDING


def test_ids_beyond_the_logits_are_never_allowed() -> None:
    """A tokenizer may know more tokens than its model has logits."""
    request = make_request("r", GrammarSpec("regex", "(.|\n)*"))
    structured = make_structured(request, vocab_size=1001)
    masks = structured.start(step_of(*sequences_of(request)))
    assert masks is not None
    ids = allowed(masks.wait()[0])
    assert len(ids) > 900 and max(ids) <= 1000


def test_the_cache_of_grammars_is_bounded_and_waiting_requests_keep_theirs() -> None:
    first = make_request("first", GrammarSpec("regex", "a"))
    structured = make_structured(first)
    for number in range(structured_output.MAX_CACHED_GRAMMARS + 5):
        structured.add(make_request(str(number), GrammarSpec("regex", f"a{number}")))
    assert len(structured._cache) == structured_output.MAX_CACHED_GRAMMARS
    assert structured.is_ready(first)
    masks = structured.start(step_of(*sequences_of(first)))
    assert masks is not None and allowed(masks.wait()[0]) == {token("a")}
