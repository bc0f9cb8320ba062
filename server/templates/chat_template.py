"""Chat templates: which variables they read, and how a conversation is rendered.

A template is probed once (template_probe.py). Each conversation is then written the way that the
template reads it (template_messages.py), rendered, and protected from control tokens that clients
spelt (client_text.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import structlog
from transformers.utils.chat_template_utils import render_jinja_template

from ...engine.errors import ConfigurationError, InvalidRequestError, one_line
from ..templates.client_text import ControlTokens, Placeholders
from ..templates.template_messages import write_messages
from ..templates.template_probe import probe_template
from ..templates.template_traits import TemplateTraits

log = structlog.get_logger(__name__)

RESERVED_NAMES = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "conversation",
        "conversations",
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

_GLOBALS = frozenset(jinja2.Environment().globals)
"""Names that Jinja itself defines."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers, which marks the assistant's text for training. Jinja does not know it."""


class Rendered(NamedTuple):
    """The text of a prompt."""

    text: str
    has_aliases: bool
    """Control tokens are written by their aliases, since the text also spells some."""
    changes: tuple[str, ...] = ()
    """What was moved so that the template writes it (constants of template_messages.py)."""
    dropped: tuple[str, ...] = ()
    """Paths of the fields that the template does not read."""


class ChatTemplates:
    """The chat templates of one tokenizer: chooses one, and renders conversations with it."""

    def __init__(self, hf: Any, tokens: ControlTokens, named: Mapping[str, str]) -> None:
        """`hf` is the Hugging Face tokenizer, whose special tokens templates may name. `named` are
        the model's templates as `named_templates` returns them."""
        self._named = named
        self._names: dict[str, Any] = dict(hf.special_tokens_map)
        self._tokens = tokens
        self.traits = lru_cache(maxsize=16)(self._probe)
        """Returns what a template reads. Raises InvalidRequestError if it is not a template."""

    @property
    def texts(self) -> str | None:
        """The texts of all templates, or None if the model has none."""
        return "\n".join(self._named.values()) or None

    def choose(
        self, *, tools: bool = False, documents: bool = False, calls: bool = False
    ) -> str | None:
        """Return the template for a request that offers tools or has documents: the one of this use
        if the model has several, or else the default. `calls` says that earlier turns have calls:
        the template for tools is also taken if the default does not write these."""
        default = self._named.get("default")
        if calls and default is not None and "tool_use" in self._named:
            tools = tools or not self.traits(default).calls
        wanted = (("tool_use", tools), ("rag", documents), ("default", True))
        return next(
            (self._named[name] for name, use in wanted if use and name in self._named), None
        )

    def describe(self) -> dict[str, Any]:
        """Return what each template reads, as a JSON object. A text that is no template reads
        nothing."""
        found: dict[str, Any] = {}
        for name, template in self._named.items():
            try:
                found[name] = self.traits(template).as_dict()
            except InvalidRequestError as error:
                found[name] = {"error": str(error)}
        return found

    def log_shortcomings(self) -> None:
        """Log what each template does not write, and what becomes of such requests."""
        for name, template in self._named.items():
            try:
                shortcomings = self.traits(template).shortcomings()
            except InvalidRequestError as error:
                shortcomings = [f"{error}: chats are refused"]
            for shortcoming in shortcomings:
                log.warning("chat_template", template=name, shortcoming=shortcoming)

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """Return the prompt of `messages`.

        The arguments of calls in `messages` are JSON texts. `settings` are the template's variables
        and the keyword arguments of transformers' `render_jinja_template`. Raises
        InvalidRequestError if the template fails on them, or would leave something out.
        """
        # 1. Write everything as the template reads it.
        traits = self.traits(template)
        written = write_messages(messages, traits, with_tools=bool(tools))
        dropped = [*written.dropped, *_unread_documents(documents, traits)]
        fields = {
            **settings,
            "tools": _write_tools(tools, traits),
            "documents": None if documents is None else [dict(each) for each in documents],
        }
        # 2. Render.
        rendered = self.render_as_is(template, written.messages, fields)
        return rendered._replace(changes=written.changes, dropped=tuple(dropped))

    def render_as_is(
        self, template: str, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> Rendered:
        """Return the prompt of `messages`, which are those that the template reads. Raises
        InvalidRequestError if it fails on them."""
        # Hide the control tokens that the client spelt, render, and put them back.
        placeholders = Placeholders(self._tokens)
        conversation, fields = placeholders.hide(list(messages)), placeholders.hide(dict(fields))
        try:
            text = self._render(template, conversation, fields)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template refused the messages: {one_line(str(error))}", "messages"
            ) from error
        if placeholders.is_used:
            text = placeholders.restore(text)
        return Rendered(text, placeholders.is_used, (), ())

    def _render(
        self, template: str, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> str:
        texts, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            **{**self._names, **fields},
        )
        return str(texts[0])

    def _probe(self, template: str) -> TemplateTraits:
        def render(messages: Sequence[Mapping[str, Any]], **fields: Any) -> str:
            return self._render(template, messages, fields)

        readable = {
            name
            for name in template_variables(template) - self._names.keys() - _GLOBALS
            if name in ("tools", "documents")
            or not (name in RESERVED_NAMES or name.endswith("_token"))
        }
        return probe_template(render, _TEMPLATE_ERRORS, template, readable, self._tokens.pattern)


def _write_tools(
    tools: Sequence[Mapping[str, Any]] | None, traits: TemplateTraits
) -> list[dict[str, Any]] | None:
    """Return tools in the form that a template reads. Raises InvalidRequestError if it writes
    none."""
    if not tools:
        return None
    if traits.tools == "none":
        raise InvalidRequestError("the chat template does not write tools", "tools")
    written = []
    for tool in tools:
        function = dict(tool["function"])
        if traits.needs_description:
            function.setdefault("description", "")
        flat = function if traits.tools == "flat" else {}
        written.append({**tool, "function": function, **flat})
    return written


def _unread_documents(
    documents: Sequence[Mapping[str, Any]] | None, traits: TemplateTraits
) -> list[str]:
    """Return the paths of the fields of documents that a template does not read. Raises
    InvalidRequestError for a document of which it reads nothing."""
    if not documents or "*" in traits.documents:
        return []
    paths = []
    for index, document in enumerate(documents):
        unread = [name for name in document if name not in traits.documents]
        if len(unread) == len(document):
            known = ", ".join(traits.documents)
            raise InvalidRequestError(
                f"documents[{index}]: the chat template "
                + (f"reads only {known} of documents" if known else "does not write documents"),
                f"documents[{index}]" if known else "documents",
            )
        paths += [f"documents[{index}].{name[:64]}" for name in unread if name.isidentifier()]
    return paths


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
        if name in RESERVED_NAMES or name not in known:
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
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))
    except jinja2.TemplateError as error:  # of the syntax, or of a filter that nobody knows
        raise InvalidRequestError(
            f"the chat template is invalid: {one_line(str(error))}", "chat_template"
        ) from error


def named_templates(hf: Any) -> dict[str, str]:
    """Return the chat templates of a Hugging Face tokenizer by their names: "default", and others
    for special uses ("tool_use", "rag")."""
    template: Any = hf.chat_template
    if template is None:
        return {}
    if isinstance(template, dict):
        return {str(name): str(text) for name, text in template.items()}
    return {"default": str(template)}


def read_template(value: str) -> str:
    """Return `value` if it is a template's text, or else the text of the file that it names. Raises
    ConfigurationError if the file cannot be read."""
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the template {value}: {error}") from error
