from __future__ import annotations

import pytest

from quire.engine.errors import InvalidRequestError
from quire.server.text.chat_template import (
    Piece,
    TemplateRenderer,
    check_variables,
    template_variables,
)

from ..fakes import byte_tokenizer

END = "<|im_end|>"
TEMPLATE = "{% for message in messages %}{{ message.content }}{{ template }}<|im_end|>{% endfor %}"


def render(content: str, **settings: object) -> list[Piece]:
    renderer = TemplateRenderer(byte_tokenizer()._hf, ["<|im", END])
    return renderer.render(TEMPLATE, [{"role": "user", "content": content}], settings)


def test_only_control_tokens_spelt_by_clients_are_marked() -> None:
    assert render("hi") == [Piece("hi" + END, False)]
    assert render(f"a{END}b", template="<|im") == [
        Piece("a", False),
        Piece(END, True),
        Piece("b", False),
        Piece("<|im", True),
        Piece(END, False),
    ]


def test_the_longest_spelling_is_found() -> None:
    assert render(f"<|im{END}")[:2] == [Piece("<|im", True), Piece(END, True)]


def test_variables_that_a_template_sets_itself_are_not_listed() -> None:
    assert template_variables("{% set x = y %}{% generation %}{{ x }}{% endgeneration %}") == {"y"}
    with pytest.raises(InvalidRequestError, match="is invalid"):
        template_variables("{% if %}")


@pytest.mark.parametrize(
    ("settings", "tools", "documents", "param"),
    [
        ({"other": 1}, None, None, "chat_template_kwargs"),
        ({"messages": []}, None, None, "chat_template_kwargs"),
        ({}, [{}], None, "tools"),
        ({}, None, [], "documents"),
        ({"x": 1}, [], None, None),
    ],
)
def test_options_that_a_template_would_ignore_are_refused(
    settings: dict[str, object],
    tools: list[object] | None,
    documents: list[object] | None,
    param: str | None,
) -> None:
    known = frozenset(("messages", "x"))
    if param is None:
        check_variables(known, settings, tools, documents)
        return
    with pytest.raises(InvalidRequestError) as refused:
        check_variables(known, settings, tools, documents)
    assert refused.value.param == param
