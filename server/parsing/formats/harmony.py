"""gpt-oss's harmony format: messages on channels, between control tokens, read in one pass.

    <|channel|>analysis<|message|>…<|end|>                                           reasoning
    <|start|>assistant<|channel|>commentary<|message|>…<|end|>                       content
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>                         content

Theory of operation
-------------------
The text is a sequence of stretches, each ended by a control token, and the token decides what the
next stretch is. Each reader takes one stretch and returns the token that ended it, "" at the end of
the text; `_parse` calls the reader for the token that was returned. Prompts end with ASSISTANT.

    after START, CHANNEL, CONSTRAIN   _header    part of a header: role, channel, recipient
    after MESSAGE                     _body      the message itself
    after END, CALL, RETURN           _outside   between messages (also where an answer begins)

- A header is held back until the control token after it has come, then it is dropped: START resets
  the channel and the recipient, CHANNEL sets the channel, and `to=` in any part the recipient.
- A body goes to a function if a recipient says so and the request offers tools; then its JSON
  object is the arguments of a call, and what follows the object is text. An empty body is a call
  without arguments. A body that begins otherwise is text.
- Any other text is emitted as it comes: as reasoning on the channel "analysis", as content on all
  others. White space after a message is dropped. Text outside any message is content, unless it is
  a header whose START was left out.

Control tokens are never text, and two messages of the same kind are separated by a line break.
Source: https://cookbook.openai.com/articles/openai-harmony (OpenAI's library for it is not used: it
reads token ids, and downloads a vocabulary first).
"""

from __future__ import annotations

import re

from ..answer_parser import TOOL_NAME, AnswerParser, Malformed, Reader, Tools
from ..call_shape import CallShape
from ..message_events import ContentText, ReasoningText
from ..reasoning import tag_tail
from ..tool_format import ToolFormat

START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN = CONTROL_TOKENS = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
    *("<|end|>", "<|call|>", "<|return|>"),
)
ASSISTANT = START + "assistant"
"""The beginning of the assistant's messages."""
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
"""The header of reasoning."""
FINAL = f"{CHANNEL}final{MESSAGE}"
"""The header of the answer proper."""
FUNCTIONS = "functions."
"""The namespace of the request's tools in a recipient."""
MAX_HEADER = 256
"""Maximum characters between two control tokens of a header; a longer part is text."""
_RECIPIENT = re.compile(r"to=(\S+)")


class HarmonyParser(AnswerParser):
    """Turns an answer in harmony into events: reasoning, content and calls.

    A message to `functions.name`, or to a tool by its bare name, is a call, whatever its channel.
    Without `tools` no message is a call.
    """

    markers = CONTROL_TOKENS
    control_tokens = CONTROL_TOKENS

    def __init__(self, tools: Tools, *, prompt_end: str = "", reasons: bool = True) -> None:
        """`prompt_end` is the end of the prompt's text: a message that it leaves open is continued
        by the answer. Without `reasons`, the analysis is content."""
        super().__init__({})
        self._reasons = reasons
        self._channel = ""
        self._recipient = ""
        self._is_fresh = True
        """Nothing of this message has been emitted yet."""
        self._last_kind: type[ContentText | ReasoningText] | None = None
        # Read the prompt's last message for its header, without its events and tools. After a bare
        # `<|start|>assistant` a header may go on or not, which is what `_outside` expects.
        begun = prompt_end[max(prompt_end.rfind(START), 0) :]
        if begun.startswith(START) and begun != ASSISTANT:
            self.feed(begun)
            self._last_kind = None
        self._tools = tools

    def _parse(self) -> Reader[None]:
        token = yield from self._outside()
        while token:
            if token == MESSAGE:
                self._is_fresh = True
                token = yield from self._body()
            elif token in (START, CHANNEL, CONSTRAIN):
                token = yield from self._header(token)
            else:
                yield from self._skip_space()
                self._mark = self._at
                token = yield from self._outside()

    def _outside(self) -> Reader[str]:
        """Read text outside any message, or a header that omits START."""
        self._channel = self._recipient = ""
        self._is_fresh = True
        yield from self._skip_space()
        if (yield from self._take("to=")):
            return (yield from self._header(START))
        return (yield from self._control_token()) or (yield from self._text_to_token())

    def _header(self, token: str) -> Reader[str]:
        """Read the part of a header after `token`, up to the next control token."""
        # 1. Wait for the next control token, or until the part is certainly too long for a header.
        enough = MAX_HEADER + max(map(len, CONTROL_TOKENS))
        while not (found := self._pattern.search(self._text, self._mark)):
            if self._ended or len(self._text) - self._mark > enough:
                break
            yield
        # 2. A part that is too long is text.
        end = found.start() if found else len(self._text)
        if end - self._mark > MAX_HEADER:
            return (yield from self._text_to_token())
        # 3. Note the channel and the recipient.
        text = self._text[self._mark : end]
        if token == START:
            self._channel = self._recipient = ""
        elif token == CHANNEL:
            self._channel = next(iter(text.split()), "")
        if recipient := _RECIPIENT.search(text):
            self._recipient = recipient[1]
        # 4. Drop the part. At the end of the text, an unfinished header is dropped as well.
        self._at = self._mark = found.end() if found else end
        return found[0] if found else ""

    def _body(self) -> Reader[str]:
        """Read a message's body: a call if it goes to a function, and text otherwise."""
        name = self._recipient.removeprefix(FUNCTIONS)
        is_function = name != self._recipient or name in self._tools
        if self._tools and is_function and TOOL_NAME.fullmatch(name):
            try:
                return (yield from self._call(name))
            except Malformed:
                pass  # what was held back is text
        return (yield from self._text_to_token())

    def _call(self, name: str) -> Reader[str]:
        """Read the arguments of a call. Raises Malformed if the body is not a JSON object."""
        yield from self._skip_space()
        token = yield from self._control_token()
        if token or not (yield from self._peek()):
            self._begin_call(name)
            self._emit_arguments("{}")
            return token
        yield from self._call_with(name)
        yield from self._skip_space()
        self._end_call()
        return (yield from self._text_to_token())

    def _text_to_token(self) -> Reader[str]:
        """Emit text as it comes, up to the next control token."""
        while True:
            found = self._pattern.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            if not (found or self._ended):
                end = tag_tail(self._text, CONTROL_TOKENS, self._at)
            self._emit_text(end)
            self._at = end
            if found:
                self._at = self._mark = found.end()
                return found[0]
            if self._ended:
                return ""
            yield

    def _emit_text(self, end: int) -> None:
        """Emit the text from `_mark` to `end`, as reasoning or content by the channel."""
        if end <= self._mark:
            return
        text = self._text[self._mark : end]
        kind = ReasoningText if self._reasons and self._channel == "analysis" else ContentText
        if self._is_fresh and self._last_kind is kind:
            text = "\n" + text
        self._events.append(kind(text))
        self._is_fresh, self._last_kind = False, kind
        self._mark = end

    def _control_token(self) -> Reader[str]:
        """Take the control token that comes next, and return it, or "" if none does."""
        for token in CONTROL_TOKENS:
            if (yield from self._take(token)):
                self._mark = self._at
                return token
        return ""


def _shape(template: str) -> CallShape:
    before = f"{CHANNEL}commentary to={FUNCTIONS}"
    return CallShape("", before, f" {CONSTRAIN}json{MESSAGE}", "", "", "")


FORMATS = (ToolFormat("openai", HarmonyParser, _shape, ((CHANNEL,),), ("harmony",)),)
