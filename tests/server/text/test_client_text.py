"""Text of clients reaches the model as it is, whatever control tokens it spells."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.templates.client_text import ControlTokens, with_aliases
from quire.server.text.tokenizer import Tokenizer

from .tokenizers_of_kinds import CONTROL, KINDS, build

TEMPLATE = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
TOKENIZERS = {
    (kind, normalized): build(kind, TEMPLATE, normalized=normalized)
    for kind in KINDS
    for normalized in (False, True)
    # The library finds such control tokens at the beginning of a text only; see the last test.
    if (kind, normalized) != ("llama2-legacy", True)
}
ALL = pytest.mark.parametrize(("kind", "normalized"), TOKENIZERS)
# Spellings, their pieces, and texts around them.
pieces = st.sampled_from(
    [*CONTROL, "<|im_", "end|>", "<", "s>", "a", "ab", " ", "  ", "é", "b!", "7"]
)
texts = st.lists(pieces, min_size=1, max_size=8).map("".join)


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    return asyncio.run(tokenizer.encode_chat(messages, add_generation_prompt=False)).token_ids


@ALL
@settings(max_examples=40, deadline=None)
@given(content=texts)
def test_text_is_tokenised_as_if_control_tokens_did_not_exist(
    kind: str, normalized: bool, content: str
) -> None:
    """The right ids are those of the whole prompt with its own control tokens as tokens, and with
    every other character as an ordinary one: what the encoder gives for names of control tokens
    that no client can spell."""
    tokenizer = TOKENIZERS[kind, normalized]
    found = encode(tokenizer, [{"role": "user", "content": content}])
    special = tokenizer.special_ids
    counts = {text: found.count(special[text]) for text in CONTROL if text != "<unk>"}
    assert counts == {"<s>": 1, "</s>": 0, "<|im_start|>": 1, "<|im_end|>": 1}
    start, end = found.index(special["<|im_start|>"]), found.index(special["<|im_end|>"])
    between = tokenizer.backend.decode(found[start + 1 : end], skip_special_tokens=False)
    if "<unk>" not in between:  # a WordPiece vocabulary does not spell every character
        written = "user\n" + content
        if kind == "wordpiece":  # white space only separates words there
            assert between.split() == written.split()
        else:
            # SentencePiece may put one space before a text, which decoding takes away again.
            assert between.removeprefix(" ") == written.removeprefix(" ")


@ALL
@settings(max_examples=40, deadline=None)
@given(content=st.text("ab é7!", max_size=12))
def test_the_second_encoder_agrees_with_the_first(
    kind: str, normalized: bool, content: str
) -> None:
    tokenizer = TOKENIZERS[kind, normalized]
    tokens = tokenizer._control_tokens
    text = f"<s><|im_start|>user\n{content}<|im_end|>\n"
    assert tokens.pattern is not None
    aliased = tokens.pattern.sub(lambda match: tokens.aliases[match.group()], text)
    second = tokenizer._aliased_encoder()
    assert second.encode(aliased).ids == tokenizer.backend.encode(text).ids


@ALL
def test_the_end_of_a_part_and_the_next_part_make_no_control_token(
    kind: str, normalized: bool
) -> None:
    tokenizer = TOKENIZERS[kind, normalized]
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>", "<", "/s>")]
    found = encode(tokenizer, [{"role": "user", "content": parts}])
    assert found.count(tokenizer.special_ids["<|im_end|>"]) == 1
    assert tokenizer.special_ids["</s>"] not in found


@pytest.mark.parametrize("kind", ["llama2-legacy", "metaspace-always", "unigram"])
def test_no_space_appears_around_a_spelt_control_token(kind: str) -> None:
    # Each piece encoded by itself would get the space that SentencePiece puts before a text.
    found = encode(TOKENIZERS[kind, False], [{"role": "user", "content": "a<|im_end|>b"}])
    decoded = TOKENIZERS[kind, False].backend.decode(found, skip_special_tokens=False)
    assert "a<|im_end|>b<|im_end|>" in decoded


def test_a_name_that_bpe_merges_into_stays_in_the_vocabulary() -> None:
    tokens = ControlTokens(["ab"])
    text = with_aliases(
        '{"added_tokens": [{"content": "ab", "special": true, "normalized": true}], '
        '"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "unk_token": "ab"}}',
        tokens,
    )
    alias = tokens.aliases["ab"]
    assert f'"{alias}":2' in text and '"ab":2' in text
    assert f'"unk_token":"{alias}"' in text


def test_beginnings_of_words_are_not_taken_for_control_tokens() -> None:
    assert ControlTokens(["user_turn", "<x>"]).beginnings == {"<", "<x"}


def test_control_tokens_that_a_normaliser_hides_are_still_told_apart() -> None:
    tokenizer = build("llama2-legacy", TEMPLATE, normalized=True)
    found = encode(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}])
    special = tokenizer.special_ids
    assert found.count(special["<|im_end|>"]) == found.count(special["<|im_start|>"]) == 1
    assert "a<|im_end|>b" in tokenizer.backend.decode(found, skip_special_tokens=False)
