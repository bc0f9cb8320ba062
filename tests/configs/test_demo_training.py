"""Test that the demo model's corpus is generated deterministically and omits held-out data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

REPOSITORY = Path(__file__).parents[2]
TRAINING, DEMO = REPOSITORY / "configs" / "demo_training", REPOSITORY / "configs" / "demo"


@pytest.fixture
def corpus() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        import corpus  # type: ignore[import-not-found]

        yield corpus


def test_the_same_seed_gives_the_same_corpus(corpus: ModuleType) -> None:
    first, again = (list(corpus.documents(7, 3, 60)) for _ in range(2))
    assert first == again
    assert first != list(corpus.documents(8, 3, 60))
    assert first != list(corpus.documents(7, 4, 60))


def test_training_renders_chats_as_the_template_does(corpus: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rng, facts = random.Random(5), corpus.load_facts()
    for _ in range(40):
        messages, tools = corpus.tool_turn(rng)
        if rng.random() < 0.5:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        messages += corpus.any_turn(rng, facts)
        offered = tools if rng.random() < 0.7 else None
        expected = tokenizer.apply_chat_template(messages, tools=offered, tokenize=False)
        assert "".join(text for text, _ in corpus.render(messages, offered)) + "\n" == expected


def test_only_the_answer_and_its_end_are_training_targets(
    corpus: ModuleType, tmp_path: Path
) -> None:
    import numpy as np

    corpus.write_shard(0, seed=3, count=20, out=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with np.load(tmp_path / "shard0000.npz") as shard:
        tokens, target, starts = shard["tokens"], shard["target"], shard["starts"]
    drawn = list(corpus.documents(3, 0, 20))
    assert tokenizer.decode(tokens) == "".join(text for d in drawn for text, _ in d)
    learnt = "".join(text for d in drawn for text, is_learnt in d if is_learnt)
    assert tokenizer.decode(tokens[target]) == learnt
    assert len(starts) == 20 and starts[0] == 0
    ends = tokens[np.append(starts[1:], len(tokens)) - 1]
    assert set(ends.tolist()) == {tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_held_out_questions_and_sums_never_occur(corpus: ModuleType) -> None:
    from skills import is_held_out_sum, operands, sum_turn  # type: ignore[import-not-found]

    for fact in corpus.load_facts():
        assert not {*fact.held_out, *fact.unseen} & set(fact.questions)
    rng = random.Random(1)
    drawn = [operands(rng, "+") for _ in range(3000)]
    assert any(is_held_out_sum(a, b) for a, b in drawn)
    for _ in range(3000):
        answer = sum_turn(rng)[1]["content"]
        left = answer.split(" = ")[0].split(" ")
        if len(left) == 3 and "," not in answer:
            assert not is_held_out_sum(int(left[0]), int(left[2]))


def test_every_fact_has_questions_and_no_question_has_two_answers(corpus: ModuleType) -> None:
    facts = corpus.load_facts()
    assert len(facts) >= 120
    owner: dict[str, str] = {}
    for fact in facts:
        assert fact.answer.endswith(".") and "<|" not in fact.answer, fact.name
        assert len(set(fact.questions)) >= 4 and fact.unseen, fact.name
        for question in {*fact.questions, *fact.unseen, *fact.held_out}:
            key = question.lower().strip("?. ")
            assert owner.setdefault(key, fact.name) == fact.name, question
