from __future__ import annotations

import pytest

from quire.engine.errors import InvalidRequestError
from quire.server.templates.chat_template import ChatTemplates, check_variables, template_variables
from quire.server.templates.client_text import ControlTokens

from ..fakes import byte_tokenizer

END = "<|im_end|>"
TEMPLATE = "{% for message in messages %}{{ message.content }}{{ template }}<|im_end|>{% endfor %}"


def render(content: str, **settings: object) -> str:
    """Return the rendered text, with [n] for the alias of control token n."""
    tokens = ControlTokens(["<|im", END])
    templates = ChatTemplates(byte_tokenizer()._hf, tokens, {})
    rendered = templates.render(TEMPLATE, [{"role": "user", "content": content}], settings)
    text = rendered.text
    for number, alias in enumerate(tokens.aliases.values()):
        text = text.replace(alias, f"[{number}]")
    assert rendered.has_aliases == (text != rendered.text)
    return text


def test_only_control_tokens_of_the_template_get_aliases() -> None:
    assert render("hi") == "hi" + END
    assert render(f"a{END}b", template="<|im") == f"a{END}b<|im[0]"


def test_the_longest_spelling_is_found() -> None:
    assert render(f"<|im{END}") == f"<|im{END}[0]"


def test_the_beginning_of_a_control_token_at_the_end_of_a_text_stays_text() -> None:
    assert render("a<", template="|im_end|>") == "a<|im_end|>[0]"
    assert render("a< ", template="x") == "a< x[0]"


def test_variables_that_a_template_sets_itself_are_not_listed() -> None:
    assert template_variables("{% set x = y %}{% generation %}{{ x }}{% endgeneration %}") == {"y"}
    for broken in ("{% if %}", "{{ x | no_such_filter }}"):
        with pytest.raises(InvalidRequestError, match="is invalid") as caught:
            template_variables(broken)
        assert "\n" not in caught.value.message


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
