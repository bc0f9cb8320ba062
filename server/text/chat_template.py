"""Chat templates: which variables they read, and how a conversation is rendered.

Text from clients must never turn into control tokens, even if it spells one ("<|im_end|>"), while
those that the template writes must. The rendered text alone does not show who wrote what, so the
spellings of clients are replaced by placeholders before the template runs. The result comes in
pieces that are marked accordingly, and each is encoded in its own way (tokenizer.py).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta

from ...engine.errors import ConfigurationError, InvalidRequestError, one_line
from .generic_tools import renders_system
from .template_calls import reads_text, with_objects

_RESERVED = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "conversation",
        "chat_template",
        "tokenizer",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "tokenizer_kwargs",
        "return_assistant_tokens_mask",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    )
)
"""Names that a request may not pass to a chat template: they are other fields of the request, or
arguments of the library."""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""Errors that a template raises on messages that it was not written for."""

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers, which marks the assistant's text for training. Jinja does not know it."""


class Piece(NamedTuple):
    """A stretch of a rendered prompt."""

    text: str
    is_from_client: bool
    """The text spells a control token, but must be encoded as plain text."""


class TemplateRenderer:
    """Renders conversations with the chat templates of one tokenizer."""

    def __init__(self, hf: Any, control_tokens: Collection[str]) -> None:
        """`hf` is the Hugging Face tokenizer, which runs the templates."""
        self._hf = hf
        # Longest first, so that the whole spelling is found if another one is its beginning.
        spellings = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._reads_text_arguments = lru_cache(maxsize=16)(self._probe_arguments)
        self.renders_system = lru_cache(maxsize=16)(self._probe_system)
        """Returns whether a chat template renders system messages."""

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> list[Piece]:
        """Return the prompt of `messages` in pieces.

        The arguments of calls in `messages` are JSON texts. `settings` are the template's variables
        and the keyword arguments of transformers' `apply_chat_template`. Raises InvalidRequestError
        if the template fails on them.
        """
        # 1. Write the arguments of calls in the form that this template reads.
        fields = [dict(message) for message in messages]
        if not self._reads_text_arguments(template):
            fields = with_objects(fields)
        # 2. Hide the control tokens that the client spelt.
        placeholders = _Placeholders(self._spellings)
        fields, settings = placeholders.hide(fields), placeholders.hide(dict(settings))
        # 3. Give "developer" the name that the template knows.
        if "developer" not in template:
            for message in fields:
                if message["role"] == "developer":
                    message["role"] = "system"
        # 4. Render, and put the hidden spellings back.
        try:
            text = self._hf.apply_chat_template(
                fields, tokenize=False, chat_template=template, **settings
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template refused the messages: {one_line(str(error))}", "messages"
            ) from error
        return placeholders.split(text)

    def _probe_arguments(self, template: str) -> bool:
        """Return whether `template` reads the arguments of calls as JSON text."""
        return reads_text(self._plain_render(template), _TEMPLATE_ERRORS)

    def _probe_system(self, template: str) -> bool:
        return renders_system(self._plain_render(template), _TEMPLATE_ERRORS)

    def _plain_render(self, template: str) -> Callable[[list[dict[str, Any]]], str]:
        """Return the function that renders messages, without any settings."""

        def render(messages: list[dict[str, Any]]) -> str:
            text = self._hf.apply_chat_template(messages, tokenize=False, chat_template=template)
            return str(text)

        return render


class _Placeholders:
    """Replaces the control tokens that clients spelt, so that no template writes them out.

    A placeholder consists of digits only, which no filter of a template changes. It begins with a
    nonce that a client cannot guess, and ends with the index of the spelling that it replaces.
    """

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self._pattern = pattern
        self._nonce = f"{secrets.randbits(128):039d}"
        self._spellings: list[str] = []

    def hide(self, value: Any) -> Any:
        """Return the JSON value `value` with all spellings in its strings and keys replaced."""
        if isinstance(value, str):
            return self._pattern.sub(self._replace, value) if self._pattern else value
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        self._spellings.append(match.group())
        return f"{self._nonce}{len(self._spellings) - 1:09d}"

    def split(self, text: str) -> list[Piece]:
        """Cut the rendered text at the placeholders, and put the spellings back."""
        if not self._spellings:
            return [Piece(text, False)]
        parts = re.split(f"{self._nonce}([0-9]{{9}})", text)
        pieces = [
            Piece(self._spellings[int(part)], True) if index % 2 else Piece(part, False)
            for index, part in enumerate(parts)
        ]
        return [piece for piece in pieces if piece.text]


def check_variables(
    known: frozenset[str],
    settings: Mapping[str, Any],
    tools: Sequence[Any] | None,
    documents: Sequence[Any] | None,
) -> None:
    """Raise InvalidRequestError if a template would ignore something that a request passes to it.

    `known` is that of `template_variables`.
    """
    for name in settings:
        if name in _RESERVED or name not in known:
            raise InvalidRequestError(
                f"chat_template_kwargs: the chat template has no setting {name[:64]!r}",
                "chat_template_kwargs",
            )
    if tools and "tools" not in known:
        raise InvalidRequestError("the chat template does not read tools", "tools")
    if documents is not None and "documents" not in known:
        raise InvalidRequestError("the chat template does not read documents", "documents")


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """Return the names that `template` reads and does not set itself. Raises InvalidRequestError if
    it is not a template."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateError as error:
        raise InvalidRequestError(
            f"the chat template is invalid: {error}", "chat_template"
        ) from error
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def default_template(hf: Any) -> str | None:
    """Return the chat template of a Hugging Face tokenizer, or None if it has none. Of several, the
    one named "default" is taken."""
    template: Any = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)


def read_template(value: str) -> str:
    """Return `value` if it is a template's text, or else the text of the file that it names. Raises
    ConfigurationError if the file cannot be read."""
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"chat_template: cannot read {value}: {error}") from error
