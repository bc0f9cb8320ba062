"""Text and chats to token ids, off the event loop; token ids to text.

Two encoders stand side by side: one reads the spelling of a control token ("<|im_end|>") as that
token, as chat templates need; the other encodes it as plain text, as text from clients needs.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.meta
import transformers
from tokenizers import Tokenizer as Encoder

from ...engine.errors import (
    ConfigurationError,
    ContextLengthError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedModelError,
)
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
"""Names that a request may not hand to a chat template, nor through it to the tokenizer."""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template raises on messages that it was not written for."""

_Result = TypeVar("_Result")

NUM_THREADS = 2
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class Tokenizer:
    """A fast Hugging Face tokenizer with its chat template. Safe to share among tasks."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        if not getattr(hf, "is_fast", False):
            raise UnsupportedModelError(f"{type(hf).__name__} is not a fast tokenizer")
        self._hf = hf
        self.backend: Encoder = Encoder.from_str(hf.backend_tokenizer.to_str())
        """Reads control tokens. A copy: the library's own object is changed by its callers."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self._plain = Encoder.from_str(self.backend.to_str())
        self._plain.encode_special_tokens = True
        self._threads = ThreadPoolExecutor(NUM_THREADS, "tokenizer")
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self.longest_token = max(map(len, vocabulary))
        special = [
            token.content
            for token in self.backend.get_added_tokens_decoder().values()
            if token.special
        ]
        # Longest first, so that of two spellings that begin alike the whole one is found.
        spellings = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._template = chat_template if chat_template is not None else _template_of(hf)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)
        self._reads_text_arguments = lru_cache(maxsize=16)(self._probe_arguments)
        self.byte_level = '"ByteLevel"' in str(self.backend.decoder.__getstate__())

    @classmethod
    def load(
        cls, model: str, *, trust_remote_code: bool = False, chat_template: str | None = None
    ) -> Tokenizer:
        """Load by name or folder. `chat_template` is a file's path or the template's text.

        Raises ModelLoadError, UnsupportedModelError, ConfigurationError.
        """
        try:
            hf = transformers.AutoTokenizer.from_pretrained(
                model, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelLoadError(f"cannot load the tokenizer of {model}: {reason}") from error
        return cls(hf, None if chat_template is None else _read_template(chat_template))

    @property
    def chat_template(self) -> str | None:
        return self._template

    @property
    def special_ids(self) -> dict[str, int]:
        """The control tokens."""
        return {
            token.content: token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }

    async def template_variables(self, template: str | None = None) -> frozenset[str]:
        """What `template`, or else the model's own, reads. Raises InvalidRequestError."""
        template = template if template is not None else self._template
        if template is None:
            raise InvalidRequestError("the model has no chat template", "messages")
        return await self._in_thread(_template_variables, template)

    def skipped_but(self, shown: Sequence[str]) -> tuple[bool, frozenset[int]]:
        """How to skip all control tokens but these: whether as the library skips them, and where
        it would skip one of these, the ids to hide instead."""
        special = self.special_ids
        if special.keys().isdisjoint(shown):
            return True, frozenset()
        return False, frozenset(id for text, id in special.items() if text not in shown)

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        keep_first: int | None = None,
    ) -> list[int]:
        """Token ids of a prompt, control tokens read. Raises ContextLengthError without
        tokenising where the text cannot fit into `max_tokens` tokens.

        `keep_first` n drops the end of a text of more than n tokens, but not the special tokens
        that are added behind it. Raises InvalidRequestError where those alone are more.
        """
        if keep_first is not None:
            text = text[: keep_first * self.longest_token]
            return await self._in_thread(
                _encode_first, self.backend, text, add_special_tokens, keep_first
            )
        self._check_length(len(text), max_tokens)
        return await self._in_thread(_encode, self.backend, text, add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        documents: list[dict[str, Any]] | None = None,
        tools: list[dict[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Render the chat template and encode it. What clients wrote is encoded as plain text,
        though it spell a control token. The arguments of calls in `messages` are JSON texts.
        Raises InvalidRequestError, ContextLengthError."""
        self._check_length(
            sum(len(message.get("content") or "") for message in messages), max_tokens
        )
        known = await self.template_variables(template)
        kwargs = dict(template_kwargs or {})
        for name in kwargs:
            if name in _RESERVED or name not in known:
                raise InvalidRequestError(
                    f"chat_template_kwargs: the chat template has no setting {name[:64]!r}",
                    "chat_template_kwargs",
                )
        if tools and "tools" not in known:
            raise InvalidRequestError("the chat template reads no tools", "tools")
        if documents is not None and "documents" not in known:
            raise InvalidRequestError("the chat template reads no documents", "documents")
        return await self._in_thread(
            self._render_and_encode,
            template if template is not None else self._template,
            [dict(message) for message in messages],
            {**kwargs, "documents": documents, "tools": tools},
            add_generation_prompt,
            continue_final_message,
            add_special_tokens,
            max_tokens,
        )

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        def run() -> str:
            text: str = self.backend.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens
            )
            return text

        return await self._in_thread(run)

    def token_text(self, token_id: int) -> str:
        """One token as text, for people; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def info(self) -> dict[str, Any]:
        """What /tokenizer_info tells."""
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": self.vocab_size,
            "chat_template": self._template,
            "special_tokens": {
                name: str(token) for name, token in self._hf.special_tokens_map.items()
            },
            # These three at the top, as in a tokenizer_config.json: lm-eval reads them there.
            "eos_token": self._hf.eos_token,
            "bos_token": self._hf.bos_token,
            "pad_token": self._hf.pad_token,
            "eos_token_id": self._hf.eos_token_id,
            "bos_token_id": self._hf.bos_token_id,
        }

    async def _in_thread(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _check_length(self, characters: int, max_tokens: int | None) -> None:
        if max_tokens is not None and characters > max_tokens * self.longest_token:
            raise ContextLengthError(
                f"the prompt of {characters} characters cannot fit the context of {max_tokens} "
                "tokens",
                "prompt",
            )

    def _render_and_encode(
        self,
        template: str,
        messages: list[dict[str, Any]],
        kwargs: dict[str, Any],
        add_generation_prompt: bool,
        continue_final_message: bool,
        add_special_tokens: bool,
        max_tokens: int | None,
    ) -> list[int]:
        if not self._reads_text_arguments(template):
            messages = with_objects(messages)
        hidden = _Hidden(self._special)
        messages, kwargs = hidden.hide(messages), hidden.hide(kwargs)
        if "developer" not in template:
            for message in messages:
                if message["role"] == "developer":
                    message["role"] = "system"
        try:
            text = self._hf.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:500]
            raise InvalidRequestError(
                f"the chat template refused the messages: {reason}", "messages"
            ) from error
        self._check_length(len(text), max_tokens)
        token_ids: list[int] = []
        for piece, is_client_text in hidden.split(text):
            encoder = self._plain if is_client_text else self.backend
            token_ids += _encode(encoder, piece, add_special_tokens and not token_ids)
        return token_ids

    def _probe_arguments(self, template: str) -> bool:
        def render(messages: list[dict[str, Any]]) -> str:
            text = self._hf.apply_chat_template(messages, tokenize=False, chat_template=template)
            return str(text)

        return reads_text(render, _TEMPLATE_ERRORS)

    def _token_bytes(self, token_id: int) -> bytes:
        added = self.backend.get_added_tokens_decoder().get(token_id)
        piece = self.backend.id_to_token(token_id)
        if added is not None or piece is None:
            return (piece or "").encode()
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


class _Hidden:
    """Control tokens spelt by clients, kept from the template's output by placeholders.

    The placeholder is digits alone (no filter of a template changes those), begins with a nonce
    that a client cannot guess, and holds the index of what it stands for.
    """

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special = special
        self._nonce = f"{secrets.randbits(128):039d}"
        self._spellings: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value` (JSON) with every spelling in its strings, keys too, replaced."""
        if isinstance(value, str):
            return self._special.sub(self._replace, value) if self._special else value
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        self._spellings.append(match.group())
        return f"{self._nonce}{len(self._spellings) - 1:09d}"

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The rendered text in pieces; True marks what a client spelt."""
        if not self._spellings:
            return [(text, False)]
        parts = re.split(f"{self._nonce}([0-9]{{9}})", text)
        pieces = [
            (self._spellings[int(part)], True) if index % 2 else (part, False)
            for index, part in enumerate(parts)
        ]
        return [piece for piece in pieces if piece[0]]


def _encode(encoder: Encoder, text: str, add_special_tokens: bool) -> list[int]:
    # The batch call gives up the interpreter lock while it works; `encode` was seen to hold it.
    [encoding] = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _encode_first(encoder: Encoder, text: str, add_special_tokens: bool, count: int) -> list[int]:
    room = count - (encoder.num_special_tokens_to_add(False) if add_special_tokens else 0)
    if room < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens of {count} leaves no room beside the special tokens",
            "truncate_prompt_tokens",
        )
    [encoding] = encoder.encode_batch([text], add_special_tokens=False)
    encoding.truncate(room)
    ids: list[int] = encoder.post_process(encoding, None, add_special_tokens).ids
    return ids


def _template_of(hf: Any) -> str | None:
    template: Any = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)


def _read_template(value: str) -> str:
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"chat_template: cannot read {value}: {error}") from error


@lru_cache(maxsize=16)
def _template_variables(template: str) -> frozenset[str]:
    """Names that the template reads and does not set itself."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateError as error:
        raise InvalidRequestError(
            f"the chat template is wrong: {error}", "chat_template"
        ) from error
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table of a printable character for each byte, inverted: printable Latin-1 stands
    for itself, the other bytes for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + offset): byte for offset, byte in enumerate(rest)}
