"""The bases of the formats in which a call is a JSON object with a name and arguments."""

from __future__ import annotations

from typing import ClassVar

from .answer_parser import TOOL_NAME, Malformed, Reader
from .tool_parser import ToolParser


class JsonCalls(ToolParser):
    """Reads one call that is written as a JSON object, or a list of them."""

    def _call_object(self, *, bare: bool = False, nested: bool = False) -> Reader[None]:
        """Read one call, `{"name": …, "arguments": {…}}`. Raises Malformed.

        "function" and "tool_name" are other keys for the name, "parameters" for the arguments, and
        `{"function": {…}}` is a call too; the inner object is `nested`. Members may come in any
        order, and others are skipped. `bare` says that no marker announced a call: then it must
        have an offered tool's name, arguments after that, and no others than "type" and "id".
        """
        yield from self._expect("{")
        name: str | None = None
        begun = False
        arguments: str | None = None
        while True:
            # 1. Read a key.
            key = yield from self._key()
            # 2. Read its value. Arguments are streamed if the name is known by now; otherwise they
            #    are kept for step 4, since an event of arguments needs a call that has begun.
            outer = not (nested or begun)
            if key == "function" and outer and (yield from self._peek()) == "{":
                yield from self._call_object(bare=bare, nested=True)
                begun = True
            elif key in ("name", "function", "tool_name") and name is None and not begun:
                name = yield from self._string()
                if not TOOL_NAME.fullmatch(name) or (bare and name not in self._tools):
                    raise Malformed
            elif key in ("arguments", "parameters") and arguments is None and not begun:
                if name is not None:
                    yield from self._call_with(name)
                    begun = True
                elif bare:
                    raise Malformed
                else:
                    arguments = yield from self._buffered_arguments()
            elif bare:
                if key not in ("type", "id"):
                    raise Malformed
                yield from self._string()
            else:
                yield from self._json()
            # 3. Go on after a comma, or end with the object.
            yield from self._skip_space()
            if (yield from self._object_ends()):
                break
        # 4. Emit a call whose arguments were kept or left out.
        if not begun:
            if name is None or bare:
                raise Malformed
            self._begin_call(name)
            self._emit_arguments(arguments or "{}")
        self._end_call()

    def _object_ends(self) -> Reader[bool]:
        """Take a comma or the brace that ends an object, with or without a comma before it; return
        whether the object has ended. Raises Malformed."""
        if not (yield from self._take("}")):
            yield from self._expect(",")
            yield from self._skip_space()
            return (yield from self._take("}"))
        return True

    def _key(self) -> Reader[str]:
        """Read the key of a member, up to the beginning of its value. Raises Malformed."""
        yield from self._skip_space()
        key = yield from self._string()
        yield from self._skip_space()
        yield from self._expect(":")
        yield from self._skip_space()
        return key

    def _call_list(self) -> Reader[None]:
        """Read a list of calls, `[{…}, {…}]`, of at least one. Raises Malformed."""
        yield from self._expect("[")
        ended = False
        while not ended:
            yield from self._skip_space()
            yield from self._call_object()
            yield from self._skip_space()
            ended = yield from self._take("]")
            if not ended:
                yield from self._expect(",")
                yield from self._skip_space()
                ended = yield from self._take("]")
        self._end_call()


class TaggedCalls(JsonCalls):
    """The base of the formats in which JSON objects or lists of them stand between tags."""

    tags: ClassVar[dict[str, str]]
    """The tag that ends calls, or "" if there is none, by the marker that begins them."""

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        if (yield from self._peek()) == "[":
            yield from self._call_list()
        else:
            yield from self._call_sequence()
        if self.tags[marker]:
            yield from self._close(self.tags[marker])

    def _call_sequence(self) -> Reader[None]:
        """Read one call, and others that follow without a comma. Raises Malformed."""
        while True:
            self._after_call = False
            try:
                yield from self._call_object()
            except Malformed:
                # A model may forget the last brace. Accept the call if its arguments are complete
                # and only white space was read after them.
                if not self._after_call or self._text[self._mark : self._at].strip():
                    raise
            yield from self._skip_space()
            if (yield from self._peek()) != "{":
                break
