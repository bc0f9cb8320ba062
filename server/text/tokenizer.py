"""Converts text and chats to token ids and back, off the event loop.

There are two encoders side by side: one reads the spelling of a control token ("<|im_end|>") as
that token, as chat templates require; the other encodes it as plain text, as text from clients
requires.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import transformers
from tokenizers import Tokenizer as Encoder

from ...engine.config import check_folder
from ...engine.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedModelError,
    one_line,
)
from .chat_template import (
    TemplateRenderer,
    check_variables,
    default_template,
    read_template,
    template_variables,
)
from .response_template import ResponseTemplate

_Result = TypeVar("_Result")

NUM_THREADS = 2
"""Threads that tokenise."""


class Tokenizer:
    """A fast Hugging Face tokenizer with its chat template. Tasks may share it."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        """`chat_template` is a template's text, which replaces the tokenizer's own."""
        if not getattr(hf, "is_fast", False):
            raise UnsupportedModelError(f"{type(hf).__name__} is not a fast tokenizer")
        self._hf = hf
        self.backend: Encoder = Encoder.from_str(hf.backend_tokenizer.to_str())
        """The encoder that reads control tokens. It is a copy, since callers of the library's own
        object change that."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self._plain = Encoder.from_str(self.backend.to_str())
        self._plain.encode_special_tokens = True
        self._threads = ThreadPoolExecutor(NUM_THREADS, "tokenizer")
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self.longest_token = max(map(len, vocabulary))
        """Characters of the longest token."""
        self._renderer = TemplateRenderer(hf, self.special_ids)
        self._template = chat_template if chat_template is not None else default_template(hf)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)
        """Returns the bytes of a token id."""
        self.byte_level = '"ByteLevel"' in str(self.backend.decoder.__getstate__())
        """Whether tokens spell bytes, as GPT-2's do, rather than SentencePiece's characters."""

    @classmethod
    def load(
        cls, model: str, *, trust_remote_code: bool = False, chat_template: str | None = None
    ) -> Tokenizer:
        """Load the tokenizer of a model's name or folder. `chat_template` is the path of a file or
        a template's text.

        Raises ModelLoadError, UnsupportedModelError, ConfigurationError.
        """
        check_folder(model)
        try:
            hf = transformers.AutoTokenizer.from_pretrained(
                model, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise ModelLoadError(
                f"cannot load the tokenizer of {model}: {one_line(str(error))}"
            ) from error
        return cls(hf, None if chat_template is None else read_template(chat_template))

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template, or None if the model has none."""
        return self._template

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the control tokens, by their text."""
        return {
            token.content: token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }

    @property
    def response_template(self) -> ResponseTemplate | None:
        """How the tokenizer says that answers are to be read, or None if it does not."""
        return ResponseTemplate.of(self._hf, self.special_ids)

    async def renders_system(self, template: str | None = None) -> bool:
        """Return whether `template`, by default the model's own, renders system messages."""
        template = template if template is not None else self._template
        return await self._in_thread(self._renderer.renders_system, template or "")

    async def template_variables(self, template: str | None = None) -> frozenset[str]:
        """Return the variables that `template`, by default the model's own, reads. Raises
        InvalidRequestError."""
        template = template if template is not None else self._template
        if template is None:
            raise InvalidRequestError("the model has no chat template", "messages")
        return await self._in_thread(template_variables, template)

    def skipped_but(self, shown: Sequence[str]) -> tuple[bool, frozenset[int]]:
        """Return how to skip all control tokens except `shown`.

        The first value says whether the library can skip control tokens by itself, which is so if
        none of `shown` is one. If not, it must skip none, and the second value holds the ids to
        hide.
        """
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
        """Return the token ids of a prompt, in which control tokens are read as such.

        Raises ContextLengthError without tokenising if the text cannot fit into `max_tokens`
        tokens. `keep_first` n cuts the end of a text of more than n tokens, but keeps the special
        tokens that are added after it; raises InvalidRequestError if they leave no room for text.
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
        """Render a chat template and return the token ids of the result.

        Text that clients wrote is encoded as plain text even if it spells a control token. The
        arguments of calls in `messages` are JSON texts. Raises InvalidRequestError and
        ContextLengthError.
        """
        self._check_length(
            sum(len(message.get("content") or "") for message in messages), max_tokens
        )
        settings = dict(template_kwargs or {})
        template = template if template is not None else self._template
        check_variables(await self.template_variables(template), settings, tools, documents)
        assert template is not None  # `template_variables` has checked it
        settings |= {
            "documents": documents,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }

        def run() -> list[int]:
            pieces = self._renderer.render(template, messages, settings)
            self._check_length(sum(len(piece.text) for piece in pieces), max_tokens)
            token_ids: list[int] = []
            for piece in pieces:
                encoder = self._plain if piece.is_from_client else self.backend
                token_ids += _encode(encoder, piece.text, add_special_tokens and not token_ids)
            return token_ids

        return await self._in_thread(run)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""

        def run() -> str:
            text: str = self.backend.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens
            )
            return text

        return await self._in_thread(run)

    def token_text(self, token_id: int) -> str:
        """Return one token as text for people to read; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def info(self) -> dict[str, Any]:
        """Return the answer of GET /tokenizer_info."""
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": self.vocab_size,
            "chat_template": self._template,
            "special_tokens": {
                name: str(token) for name, token in self._hf.special_tokens_map.items()
            },
            # These stand at the top as in a tokenizer_config.json, where lm-eval looks for them.
            "eos_token": self._hf.eos_token,
            "bos_token": self._hf.bos_token,
            "pad_token": self._hf.pad_token,
            "eos_token_id": self._hf.eos_token_id,
            "bos_token_id": self._hf.bos_token_id,
        }

    async def _in_thread(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _check_length(self, characters: int, max_tokens: int | None) -> None:
        """Raise ContextLengthError if so many characters cannot be `max_tokens` tokens or fewer."""
        if max_tokens is not None and characters > max_tokens * self.longest_token:
            raise ContextLengthError(
                f"the prompt of {characters} characters cannot fit the context of {max_tokens} "
                "tokens",
                "prompt",
            )

    def _token_bytes(self, token_id: int) -> bytes:
        # 1. Added tokens are written as they are; an id outside the vocabulary has no bytes.
        added = self.backend.get_added_tokens_decoder().get(token_id)
        piece = self.backend.id_to_token(token_id)
        if added is not None or piece is None:
            return (piece or "").encode()
        # 2. A byte-level vocabulary has one printable character for each byte.
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        # 3. SentencePiece writes bytes outside its vocabulary as <0xNN>, and a space as U+2581.
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _encode(encoder: Encoder, text: str, add_special_tokens: bool) -> list[int]:
    # The batch call releases the interpreter lock while it works; `encode` was seen to hold it.
    [encoding] = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _encode_first(encoder: Encoder, text: str, add_special_tokens: bool, count: int) -> list[int]:
    """Return the first tokens of `text`, at most `count` of them including special tokens."""
    room = count - (encoder.num_special_tokens_to_add(False) if add_special_tokens else 0)
    if room < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens of {count} leaves no room for text next to the special tokens",
            "truncate_prompt_tokens",
        )
    [encoding] = encoder.encode_batch([text], add_special_tokens=False)
    encoding.truncate(room)
    ids: list[int] = encoder.post_process(encoding, None, add_special_tokens).ids
    return ids


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Return the inverse of GPT-2's table of a printable character for each byte: printable Latin-1
    characters stand for themselves, and U+0100 onwards for the other bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + offset): byte for offset, byte in enumerate(rest)}
