"""The marks of the served model's reasoning as tokens, for counting it and for its budget."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import pre_tokenizers

from ....engine.reasoning import ReasoningSpec
from ...text.tokenizer import Tokenizer
from ..reasoning import ReasoningStyle, starts_inside, tags_of
from .harmony import ANALYSIS, ASSISTANT, CALL, CHANNEL, END, RETURN, START

_BLANK = "Ġ▁Ċĉč \t\r\n"
"""White space as vocabularies spell it."""
_AFTER_CHANNEL = ("final", "commentary")
"""Channels that may follow reasoning whose budget is used up; the second holds calls."""


class ReasoningMarks:
    """How the tokens of one model mark reasoning in one style. Made once, when the server starts,
    since it searches the vocabulary."""

    def __init__(self, style: ReasoningStyle, tokenizer: Tokenizer) -> None:
        self._style = style
        self._in_channels = style == "openai_gptoss"
        self._closings: tuple[str, ...]
        if self._in_channels:
            self._opening, self._closings = ANALYSIS, (END, CALL, RETURN, START, CHANNEL)
            end = END + ASSISTANT + CHANNEL
        else:
            self._opening, end, _ = tags_of(style)
            self._closings = (end,)
        self._pieces = _pieces(tokenizer, (self._opening, *self._closings))
        self._end = _encode(tokenizer, end)
        written = tokenizer.backend.decode(list(self._end), skip_special_tokens=False)
        self.can_end = written.strip() == end
        """Whether the vocabulary can spell the end of the reasoning, as a budget demands."""
        self._after = [_encode(tokenizer, name)[0] for name in _AFTER_CHANNEL]

    def spec(
        self,
        prompt_end: str,
        continued: str | None,
        *,
        budget: int | None = None,
        with_tools: bool = False,
    ) -> ReasoningSpec | None:
        """Return how the reasoning of an answer is marked, or None if it cannot have any.

        `prompt_end` is the text of the prompt's last tokens; see `starts_inside` for `continued`.
        """
        after_end: tuple[int, ...] = ()
        if self._in_channels:
            inside = continued is None and prompt_end.endswith(ANALYSIS)
            after_end = tuple(self._after if with_tools else self._after[:1])
        else:
            inside = starts_inside(self._style, prompt_end, continued)
            if continued is not None and not inside:
                return None
        return ReasoningSpec(
            opening=self._opening.encode(),
            closings=tuple(mark.encode() for mark in self._closings),
            pieces=self._pieces,
            begins_inside=inside,
            repeats=self._in_channels,
            budget=budget,
            end=self._end if budget is not None else (),
            after_end=after_end if budget is not None else (),
        )


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.backend.encode(text, add_special_tokens=False).ids)


def _pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[int, bytes]:
    """Return the bytes of the tokens that may be a part of one of the marks `texts`, or that are
    white space."""
    marks = list(texts)
    if tokenizer.byte_level:  # the vocabulary spells each byte as a character of its own
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        marks += ["".join(piece for piece, _ in alphabet.pre_tokenize_str(text)) for text in marks]
    # 1. Collect all texts of which such a token is one, or begins or ends with one.
    inner, heads, tails = set[str](), set[str](), set[str]()
    for mark in marks:
        size = len(mark)
        heads |= {mark[start:] for start in range(size)}
        tails |= {mark[:end] for end in range(1, size + 1)}
        inner |= {mark[start:end] for start in range(size) for end in range(start + 1, size + 1)}
    begins, ends = tuple(heads), tuple(tails)
    # 2. Look at the vocabulary's own spelling.
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {
        token_id: tokenizer.token_bytes(token_id)
        for spelling, token_id in vocabulary.items()
        if spelling in inner
        or spelling.startswith(begins)
        or spelling.endswith(ends)
        or not spelling.strip(_BLANK)
        or spelling.startswith("<0x")
        or any(mark in spelling for mark in marks)
    }
