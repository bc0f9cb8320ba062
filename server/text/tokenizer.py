"""Converts text and chats to token ids and back, off the event loop.

The encoder reads the spelling of a control token ("<|im_end|>") as that token. A second one, which
is made when it is first needed, is for chats whose messages spell control tokens (client_text.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import transformers
from tokenizers import Tokenizer as Encoder

from ...engine.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedModelError,
    check_folder,
    one_line,
)
from ..templates.chat_template import (
    ChatTemplates,
    check_variables,
    named_templates,
    read_template,
    template_variables,
)
from ..templates.client_text import ControlTokens, with_aliases
from ..templates.response_template import ResponseTemplate
from .detokenizer import Detokenizer
from .spelling import Spelling

_Result = TypeVar("_Result")

NUM_THREADS = 2
"""Threads that tokenise."""


class ChatPrompt(NamedTuple):
    """The token ids of a conversation, and what became of its messages on the way.

    `changes` names what was moved, and `dropped` the fields that the chat template does not read
    (see template_messages.py).
    """

    token_ids: list[int]
    changes: tuple[str, ...]
    dropped: tuple[str, ...]


class Tokenizer:
    """A fast Hugging Face tokenizer with its chat template. Tasks may share it."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        """`chat_template` is a template's text, which replaces all of the tokenizer's own."""
        if not getattr(hf, "is_fast", False):
            raise UnsupportedModelError(f"{type(hf).__name__} is not a fast tokenizer")
        self._hf = hf
        self.backend: Encoder = Encoder.from_str(hf.backend_tokenizer.to_str())
        """The encoder that reads control tokens. It is a copy, since callers of the library's own
        object change that."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self._threads = ThreadPoolExecutor(NUM_THREADS, "tokenizer")
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self.longest_token = max(map(len, vocabulary))
        """Characters of the longest token."""
        self.special_ids: dict[str, int] = {
            token.content: token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }
        """The ids of the control tokens, by their text."""
        self._control_tokens = ControlTokens(self.special_ids)
        self._aliased: Encoder | None = None
        self._aliased_lock = threading.Lock()
        named = named_templates(hf) if chat_template is None else {"default": chat_template}
        self.templates = ChatTemplates(hf, self._control_tokens, named)
        """The chat templates, and what they read."""
        spelling = Spelling(self.backend)
        self.token_bytes = lru_cache(maxsize=65536)(spelling.token_bytes)
        """Returns the bytes of a token id."""
        self.byte_level = spelling.byte_level
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
        tokenizer = cls(hf, None if chat_template is None else read_template(chat_template))
        tokenizer.templates.log_shortcomings()
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template, or None if the model has none."""
        return self.templates.choose()

    @property
    def response_template(self) -> ResponseTemplate | None:
        """How the tokenizer says that answers are to be read, or None if it does not."""
        return ResponseTemplate.of(self._hf, self.special_ids)

    async def renders_system(self, template: str | None = None) -> bool:
        """Return whether `template`, by default the model's own, renders system messages."""

        def run() -> bool:
            chosen = template if template is not None else self.templates.choose()
            return chosen is not None and self.templates.traits(chosen).system not in (
                "none",
                "refused",
            )

        return await self._in_thread(run)

    async def template_variables(self, template: str | None = None) -> frozenset[str]:
        """Return the variables that `template`, by default the model's own, reads. Raises
        InvalidRequestError."""
        template = template if template is not None else self.templates.choose()
        if template is None:
            raise InvalidRequestError("the model has no chat template", "messages")
        return await self._in_thread(template_variables, template)

    def skipped_but(
        self, shown: Sequence[str], stops: Sequence[str] = ()
    ) -> tuple[bool, dict[int, str]]:
        """Return how to skip all control tokens except `shown`.

        The first value says whether the library can skip control tokens by itself, which is so if
        none of `shown` is one and none of `stops` contains one. If not, it must skip none, and the
        second value holds the ids to hide, with their spellings.
        """
        special = self.special_ids
        if special.keys().isdisjoint(shown) and not self.spells_control_token(stops):
            return True, {}
        return False, {id: text for text, id in special.items() if text not in shown}

    def spells_control_token(self, texts: Sequence[str]) -> bool:
        """Return whether one of `texts` contains the spelling of a control token."""
        pattern = self._control_tokens.pattern
        return pattern is not None and any(map(pattern.search, texts))

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        keep: int | None = None,
        keep_end: bool = False,
    ) -> list[int]:
        """Return the token ids of a prompt, in which control tokens are read as such.

        Raises ContextLengthError without tokenising if the text cannot fit into `max_tokens`
        tokens. `keep` n cuts a text of more than n tokens, at its end, or with `keep_end` at its
        beginning, but keeps the special tokens that are added around it; raises InvalidRequestError
        if they leave no room for text.
        """
        if keep is not None:
            reach = keep * self.longest_token
            text = text[-reach:] if keep_end else text[:reach]
            return await self._in_thread(
                _encode_part, self.backend, text, add_special_tokens, keep, keep_end
            )
        self._check_length(len(text), max_tokens)
        return await self._in_thread(_encode, self.backend, text, add_special_tokens)

    async def encode_template(
        self, template: str, messages: Sequence[Mapping[str, Any]], *, max_tokens: int
    ) -> list[int]:
        """Render messages of whatever roles `template` reads, and return the token ids. Text of
        clients is encoded as by `encode_chat`. Raises InvalidRequestError and ContextLengthError.
        """
        self._check_length(sum(map(_content_length, messages)), max_tokens)

        def run() -> list[int]:
            rendered = self.templates.render_as_is(template, messages, {})
            encoder = self._aliased_encoder() if rendered.has_aliases else self.backend
            return _encode(encoder, rendered.text, False)

        return await self._in_thread(run)

    async def encode_pair(self, first: str, second: str, *, max_tokens: int) -> list[int]:
        """Return the token ids of two texts, joined as the tokenizer joins a pair. They are plain
        text even if they spell a control token. Raises ContextLengthError as `encode` does."""
        self._check_length(len(first) + len(second), max_tokens)

        def run() -> list[int]:
            encoder = self._aliased_encoder()
            [encoding] = encoder.encode_batch_fast([(first, second)], add_special_tokens=True)
            ids: list[int] = encoding.ids
            return ids

        return await self._in_thread(run)

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
    ) -> ChatPrompt:
        """Render a chat template and return the token ids of the result.

        Text that clients wrote is encoded as plain text even if it spells a control token. The
        arguments of calls in `messages` are JSON texts; contents are strings or lists of text
        parts. Raises InvalidRequestError and ContextLengthError.
        """
        self._check_length(sum(map(_content_length, messages)), max_tokens, "messages")
        settings = dict(template_kwargs or {})
        if template is None:
            template = self.templates.choose(
                tools=bool(tools),
                documents=documents is not None,
                calls=any(message.get("tool_calls") for message in messages),
            )
        check_variables(await self.template_variables(template), settings, tools, documents)
        assert template is not None  # `template_variables` has checked it
        chosen = template
        settings |= {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }

        def run() -> ChatPrompt:
            rendered = self.templates.render(chosen, messages, settings, tools, documents)
            self._check_length(len(rendered.text), max_tokens, "messages")
            encoder = self._aliased_encoder() if rendered.has_aliases else self.backend
            token_ids = _encode(encoder, rendered.text, add_special_tokens)
            return ChatPrompt(token_ids, rendered.changes, rendered.dropped)

        return await self._in_thread(run)

    def _aliased_encoder(self) -> Encoder:
        """Return the encoder that knows control tokens by their aliases only."""
        with self._aliased_lock:
            if self._aliased is None:
                normalizer = self.backend.normalizer
                text = with_aliases(
                    self.backend.to_str(),
                    self._control_tokens,
                    keep_normalized=normalizer is None or normalizer.normalize_str("0") == "0",
                )
                self._aliased = Encoder.from_str(text)
            return self._aliased

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""

        def run() -> str:
            text: str = self.backend.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens
            )
            return text

        return await self._in_thread(run)

    async def decode_with_offsets(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> tuple[str, list[int]]:
        """Return the text of token ids, and where in it the text of each token begins."""

        def run() -> tuple[str, list[int]]:
            detokenizer = Detokenizer(
                self.backend, skip_special_tokens=skip_special_tokens, with_offsets=True
            )
            text, _ = detokenizer.feed(token_ids)
            return text + detokenizer.finish(), detokenizer.offsets or []

        return await self._in_thread(run)

    async def offsets_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return where in `text` each of its tokens begins. A token that is not in the text, such
        as one that begins a sequence, is where the next one is."""

        def run() -> list[int]:
            [encoding] = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
            offsets, end = [], 0
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                # Some encoders leave the space out of the place of a token that begins with it.
                is_next = text.startswith(self.token_text(token_id), end)
                offsets.append(end if is_next or start == stop else start)
                end = max(end, stop)
            return offsets

        return await self._in_thread(run)

    def token_text(self, token_id: int) -> str:
        """Return one token as text for people to read; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def info(self) -> dict[str, Any]:
        """Return the answer of GET /tokenizer_info."""
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": self.vocab_size,
            "chat_template": self.chat_template,
            "chat_templates": self.templates.describe(),
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

    def _check_length(self, characters: int, max_tokens: int | None, param: str = "prompt") -> None:
        """Raise ContextLengthError if so many characters cannot be `max_tokens` tokens or fewer."""
        if max_tokens is not None and characters > max_tokens * self.longest_token:
            raise ContextLengthError(
                f"This model's maximum context length is {max_tokens} tokens, which the "
                f"{characters} characters of your {param} cannot fit. Shorten the {param}.",
                param,
            )


def _content_length(message: Mapping[str, Any]) -> int:
    content = message.get("content") or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) for part in content)


def _encode(encoder: Encoder, text: str, add_special_tokens: bool) -> list[int]:
    # The batch call releases the interpreter lock while it works; `encode` was seen to hold it.
    [encoding] = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _encode_part(
    encoder: Encoder, text: str, add_special_tokens: bool, count: int, from_end: bool
) -> list[int]:
    """Return the first tokens of `text`, or the last, at most `count` including special tokens."""
    room = count - (encoder.num_special_tokens_to_add(False) if add_special_tokens else 0)
    if room < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens of {count} leaves no room for text next to the special tokens",
            "truncate_prompt_tokens",
        )
    [encoding] = encoder.encode_batch([text], add_special_tokens=False)
    encoding.truncate(room, direction="left" if from_end else "right")
    ids: list[int] = encoder.post_process(encoding, None, add_special_tokens).ids
    return ids
