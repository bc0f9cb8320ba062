"""Compiles grammars on trial, in a process that can be killed.

A few schemas keep llguidance compiling without end (`multipleOf: 99999999`), and a thread that does
so cannot be stopped. So each grammar that the server has not seen is first compiled by a child
process, `python -P -m quire.server.text.grammar_check`, which gets the model's tokenizer and builds
exactly what the engine will build. If a grammar takes too long, a timer of the kernel ends the
child, and the next grammar starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...engine.errors import InvalidRequestError, QueueFullError
from ...engine.grammar.compile import GrammarCompileError, compile_grammar, make_tokenizer
from ...engine.request import GrammarSpec

Message = dict[str, Any]

COMPILE_SECONDS = 0.7
"""Maximum time to compile a grammar."""
START_SECONDS = 60
"""Maximum time to read the tokenizer."""
MEMORY_BYTES = 4 * 2**30
"""Maximum address space of the child."""
MAX_WAITING, MAX_WAITING_OF_ONE = 128, 16
"""Maximum grammars that wait for the child, in all and of one caller."""
MAX_REMEMBERED = 256
"""Maximum verdicts that are kept, the least recently used being dropped first."""


class GrammarCheck:
    """Owns the child process, which is started when it is first needed, and keeps its last
    verdicts."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[GrammarSpec, str | None] = OrderedDict()
        self._turns = _Turns()
        self._thread = ThreadPoolExecutor(1, "grammar-check")
        self._child: subprocess.Popen[bytes] | None = None
        self._end_child: Callable[[], object] = lambda: None

    async def check(
        self,
        spec: GrammarSpec,
        param: str,
        *,
        read_tokenizer: Callable[[], str],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        caller: Hashable = None,
    ) -> None:
        """Raise InvalidRequestError, naming `param`, if the engine could not compile `spec`.

        The grammars of one `caller` wait for each other; different callers take turns. A check that
        is cancelled while it waits costs nothing more. Raises QueueFullError if too many wait.
        `read_tokenizer` returns the text of the tokenizer.json; the other values are those of the
        engine's EngineInfo.
        """
        if spec not in self._verdicts:

            def start() -> Message:
                return {
                    "tokenizer": read_tokenizer(),
                    "vocab_size": vocab_size,
                    "eos_token_ids": list(eos_token_ids),
                }

            async with self._turns.turn(caller):
                if spec not in self._verdicts:  # it may have been decided in the meantime
                    verdict, settled = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._ask, spec, start
                    )
                    if not settled:
                        raise InvalidRequestError(f"{param}: {verdict}", param)
                    self._verdicts[spec] = verdict
                    if len(self._verdicts) > MAX_REMEMBERED:
                        self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(spec)
        if (reason := self._verdicts[spec]) is not None:
            raise InvalidRequestError(f"{param}: {reason}", param)

    def close(self) -> None:
        """End the child. Another one is started if another grammar comes."""
        if (child := self._child) is not None:
            child.kill()
        self._thread.submit(self._forget_child).result()

    def _ask(self, spec: GrammarSpec, start: Callable[[], Message]) -> tuple[str | None, bool]:
        """Return the reason to refuse `spec`, or None, and whether that verdict is final."""
        if self._child is None:
            self._child = _start_child()
            # The child also ends when this object is collected or the interpreter exits.
            self._end_child = weakref.finalize(self, _stop, self._child)
            error = _exchange(self._child, start())
            if error is not None:
                self._forget_child()
                return error or "the model's tokenizer cannot be constrained", False
        error = _exchange(self._child, {"kind": spec.kind, "text": spec.text})
        if error == "":
            self._forget_child()
            return f"the grammar takes more than {COMPILE_SECONDS} s to compile", False
        return error, True

    def _forget_child(self) -> None:
        self._end_child()
        self._child = None


class _Turns:
    """Lets one task at a time go on: the first one of each caller in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        self._num_waiting = 0
        self._taken = False

    @contextlib.asynccontextmanager
    async def turn(self, caller: Hashable) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises QueueFullError if too many wait."""
        if self._taken:
            await self._wait(caller)
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, caller: Hashable) -> None:
        line = self._waiting.get(caller, deque())
        if self._num_waiting >= MAX_WAITING or len(line) >= MAX_WAITING_OF_ONE:
            raise QueueFullError(
                f"{len(line)} grammars of this client and {self._num_waiting} in all wait to be "
                "compiled",
                len(line) * COMPILE_SECONDS,
            )
        mine = asyncio.get_running_loop().create_future()
        self._waiting[caller] = line
        line.append(mine)
        self._num_waiting += 1
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():  # its turn had just come
                self._pass_on()
            elif mine in line:
                line.remove(mine)
                self._left(caller, line)
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            caller, line = next(iter(self._waiting.items()))
            first = line.popleft()
            self._waiting.move_to_end(caller)
            self._left(caller, line)
            if not first.cancelled():
                first.set_result(None)
                return
        self._taken = False

    def _left(self, caller: Hashable, line: deque[asyncio.Future[None]]) -> None:
        self._num_waiting -= 1
        if not line:
            del self._waiting[caller]


def _start_child() -> subprocess.Popen[bytes]:
    """Start the child. It ends when its stdin is closed, so it never outlives its parent."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "quire.server.text.grammar_check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and wait for its end."""
    assert child.stdin is not None and child.stdout is not None
    child.kill()
    child.wait()
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # closing flushes input that it has not read
        child.stdin.close()


def _exchange(child: subprocess.Popen[bytes], message: Message) -> str | None:
    """Send a message to the child and return its answer: None for success, the text of an error,
    or "" if the message made it end."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(message).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return ""
    line = child.stdout.readline()
    if not line:
        return ""
    answer: str | None = json.loads(line)
    return answer


def main() -> None:
    """Answer every line of stdin, the tokenizer and then grammars, with a line: null, or the reason
    why it was refused."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's signals are for the server
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    tokenizer: Any = None
    for line in sys.stdin.buffer:
        message = json.loads(line)
        error = None
        seconds = START_SECONDS if tokenizer is None else COMPILE_SECONDS
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            if tokenizer is None:
                tokenizer = make_tokenizer(
                    message["tokenizer"], message["vocab_size"], message["eos_token_ids"]
                )
            else:
                compile_grammar(tokenizer, GrammarSpec(message["kind"], message["text"]))
        except GrammarCompileError as reason:
            error = str(reason) or "it cannot be compiled"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
