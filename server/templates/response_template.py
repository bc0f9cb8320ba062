"""The template by which a tokenizer says how its model's answers are to be read.

A tokenizer of transformers may carry a `response_template` (tokenizer_config.json): the tags of
reasoning, content and calls, and how calls are written between theirs. transformers reads answers
by it, as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...engine.errors import ConfigurationError, one_line


class ResponseTemplate:
    """A tokenizer's response template."""

    def __init__(self, hf: Any, special_tokens: Iterable[str]) -> None:
        """`hf` is the Hugging Face tokenizer, which must have a response template, and
        `special_tokens` are the texts of its control tokens."""
        self._hf = hf
        self._special_tokens = tuple(special_tokens)

    @classmethod
    def of(cls, hf: Any, special_tokens: Iterable[str]) -> ResponseTemplate | None:
        """Return the response template of a tokenizer, or None if it has none."""
        if getattr(hf, "response_template", None) is None:
            return None
        return cls(hf, special_tokens)

    def check(self) -> None:
        """Raise ConfigurationError if transformers does not understand the template."""
        try:
            self.parser("", {})
        except Exception as error:
            raise ConfigurationError(
                "tool_call_parser: the tokenizer's response_template cannot be used: "
                f"{one_line(str(error))}"
            ) from error

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The parts of a message, by their names in the message, as the template describes them."""
        fields: dict[str, dict[str, Any]] = self._hf.response_template["fields"]
        return fields

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens that the template's tags and patterns spell."""
        texts = []
        for field in self.fields.values():
            for key in ("open", "open_pattern", "close", "close_pattern"):
                value = field.get(key, ())
                texts += [value] if isinstance(value, str) else list(value)
        spelt = "\n".join([*texts, *(text.replace("\\", "") for text in texts)])
        return tuple(token for token in self._special_tokens if token and token in spelt)

    def parser(self, prompt_end: str, tools: Mapping[str, Mapping[str, Any]]) -> Any:
        """Return transformers' parser of one answer, which is fed with text and returns its events.

        `prompt_end` is the text of the prompt's end, and `tools` the schemas of the arguments, by
        the tools' names.
        """
        functions = [
            {"type": "function", "function": {"name": name, "parameters": dict(schema)}}
            for name, schema in tools.items()
        ]
        return self._hf.get_response_parser(prefix=prompt_end, tools=functions)
