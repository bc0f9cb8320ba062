"""gpt-oss's harmony format: messages on channels, between control tokens, read in one pass.

    <|channel|>analysis<|message|>…<|end|>                                           reasoning
    <|start|>assistant<|channel|>commentary<|message|>…<|end|>                       content
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>                         content

The prompt ends with `<|start|>assistant`. Source: OpenAI's guide to the format
(https://cookbook.openai.com/articles/openai-harmony). Its library, openai-harmony, downloads a
vocabulary before it reads anything and reads that vocabulary's token ids; here it is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .message_events import ContentText, ReasoningText
from .tool_parsers import TOOL_NAME, AnswerParser, Malformed, Steps

START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN = CONTROL_TOKENS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
ASSISTANT = START + "assistant"
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
FINAL = f"{CHANNEL}final{MESSAGE}"
FUNCTIONS = "functions."
MAX_HEADER = 256
"""Most characters between two control tokens of a header; more are text."""
_RECIPIENT = re.compile(r"to=(\S+)")


class HarmonyParser(AnswerParser):
    """An answer to events: reasoning, content and calls.

    A message to `functions.name`, on any channel, is a call; without `tool_names` none is. Control
    tokens are never text, a header that breaks off is none, and two messages of one kind are a
    line break apart.
    """

    markers = CONTROL_TOKENS
    control_tokens = CONTROL_TOKENS

    def __init__(
        self, tool_names: Collection[str], *, prompt_end: str = "", reasons: bool = True
    ) -> None:
        """`prompt_end` is the end of the prompt's text, where the answer may have begun. Without
        `reasons`, the analysis is content."""
        super().__init__(())
        self._reasons = reasons
        self._channel = ""
        self._recipient = ""
        self._is_fresh = True
        """Nothing of this message is told yet."""
        self._last_kind: type[ContentText | ReasoningText] | None = None
        begun = prompt_end[max(prompt_end.rfind(START), 0) :]
        if begun.startswith(START) and begun != ASSISTANT:
            self.feed(begun)  # its text, if any, is the prompt's
            self._last_kind = None
        self._tool_names = frozenset(tool_names)

    def _parse(self) -> Steps[None]:
        before = yield from self._outside()
        while before:
            if before == MESSAGE:
                self._is_fresh = True
                before = yield from self._body()
            elif before in (START, CHANNEL, CONSTRAIN):
                before = yield from self._header(before)
            else:
                yield from self._space()
                self._mark = self._at
                before = yield from self._outside()

    def _outside(self) -> Steps[str]:
        """A header without `<|start|>`, or text of no message. Returns the control token behind
        it, "" at the end; so do the following."""
        self._channel = self._recipient = ""
        self._is_fresh = True
        yield from self._space()
        if (yield from self._literal("to=")):
            return (yield from self._header(START))
        return (yield from self._control_token()) or (yield from self._told())

    def _header(self, token: str) -> Steps[str]:
        """What stands behind a header's control token."""
        enough = MAX_HEADER + max(map(len, CONTROL_TOKENS))
        while not (found := self._pattern.search(self._text, self._mark)):
            if self._ended or len(self._text) - self._mark > enough:
                break
            yield
        end = found.start() if found else len(self._text)
        if end - self._mark > MAX_HEADER:
            return (yield from self._told())
        text = self._text[self._mark : end]
        if token == START:
            self._channel = self._recipient = ""
        elif token == CHANNEL:
            self._channel = next(iter(text.split()), "")
        if recipient := _RECIPIENT.search(text):
            self._recipient = recipient[1]
        self._at = self._mark = found.end() if found else end
        return found[0] if found else ""

    def _body(self) -> Steps[str]:
        name = self._recipient.removeprefix(FUNCTIONS)
        is_function = name != self._recipient or name in self._tool_names
        if self._tool_names and is_function and TOOL_NAME.fullmatch(name):
            try:
                return (yield from self._call(name))
            except Malformed:
                pass  # what is not told in events is text
        return (yield from self._told())

    def _call(self, name: str) -> Steps[str]:
        yield from self._space()
        if (yield from self._peek()) == "{":
            self._begin_call(name)
            yield from self._json(tell=True)
            yield from self._space()
            self._settle()
            return (yield from self._told())
        token = yield from self._control_token()
        if not token and (yield from self._peek()):
            raise Malformed
        self._begin_call(name)
        self._arguments("{}")
        return token

    def _told(self) -> Steps[str]:
        """Tell text while it comes."""
        while True:
            found = self._pattern.search(self._text, self._at)
            end = found.start() if found else self._undecided()
            self._tell(end)
            self._at = end
            if found:
                self._at = self._mark = found.end()
                return found[0]
            if self._ended:
                return ""
            yield

    def _undecided(self) -> int:
        """Where the end of the text may be the beginning of a control token."""
        at = self._text.rfind("<", self._at)
        if at >= 0 and not self._ended:
            tail = self._text[at:]
            if any(token.startswith(tail) for token in CONTROL_TOKENS):
                return at
        return len(self._text)

    def _tell(self, end: int) -> None:
        if end <= self._mark:
            return
        text = self._text[self._mark : end]
        kind = ReasoningText if self._reasons and self._channel == "analysis" else ContentText
        if self._is_fresh and self._last_kind is kind:
            text = "\n" + text
        self._events.append(kind(text))
        self._is_fresh, self._last_kind = False, kind
        self._mark = end

    def _control_token(self) -> Steps[str]:
        """Take the control token that stands here, if any."""
        for token in CONTROL_TOKENS:
            if (yield from self._literal(token)):
                self._mark = self._at
                return token
        return ""
