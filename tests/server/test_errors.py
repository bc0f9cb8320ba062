from __future__ import annotations

import re

import pytest

from quire.engine import errors as tree
from quire.engine.errors import QuireError, StartupError
from quire.server.errors import ANSWERS, answer_of, error_body


def _leaves(kind: type[QuireError]) -> list[type[QuireError]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


@pytest.mark.parametrize("leaf", _leaves(QuireError), ids=lambda leaf: leaf.__name__)
def test_every_error_has_the_status_that_the_tree_documents(leaf: type[QuireError]) -> None:
    if issubclass(leaf, StartupError):
        assert answer_of(leaf("x")).status == 500
        return
    assert any(ancestor in ANSWERS for ancestor in leaf.__mro__)
    match = re.search(rf"{leaf.__name__} .*→ (\d+)", tree.__doc__ or "")
    assert match is not None
    assert answer_of(leaf("x")).status == int(match[1])


def test_a_body_names_the_parameter() -> None:
    body = error_body(tree.InvalidRequestError("no", "top_p"))
    assert body == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_value",
        }
    }


def test_an_unexpected_exception_does_not_reveal_its_text() -> None:
    error = error_body(ValueError("secret"), "r1")["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "r1" in error["message"]
