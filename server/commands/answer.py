"""An answer as it arrives: printed, collected, and timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, Any

from .http_client import Chunk

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not move the cursor or rename the window of whoever reads it.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass
class Answer:
    """What has arrived of an answer. Times are in seconds of the monotonic clock."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    was_stopped: bool = False
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    """When the first text came."""
    last: float = 0.0
    """When the last text came."""

    def summary(self) -> str:
        """Return tokens, rate, the time to the first token and cached tokens, in one line."""
        if self.usage is None or self.first is None:
            return "stopped" if self.was_stopped else "no text"
        number, prompt = self.usage["completion_tokens"], self.usage["prompt_tokens"]
        seconds = self.last - self.first
        parts = [f"{number:,} tokens"]
        if number > 1 and seconds > 0:
            parts.append(f"{(number - 1) / seconds:,.1f} tokens/s")
        parts.append(f"first after {self.first - self.asked:.2f} s")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        parts.append(f"{cached:,} of {prompt:,} prompt tokens cached")
        if self.finish_reason == "length":
            parts.append("cut at the maximum length")
        return ", ".join(parts)


def show(chunks: Iterator[Chunk], out: IO[str], reasoning: IO[str] | None, *, dim: bool) -> Answer:
    """Print an answer to `out` as it arrives and return it; Ctrl-C stops it.

    Reasoning goes to `reasoning`, if there is one; `dim` says whether escape sequences may tell it
    from the answer. Raises RequestError.
    """
    answer = Answer()
    is_dim = False
    try:
        with closing(chunks):  # type: ignore[type-var]
            for chunk in chunks:
                answer.usage = chunk.usage or answer.usage
                answer.finish_reason = chunk.finish_reason or answer.finish_reason
                if not (chunk.text or chunk.reasoning):
                    continue
                answer.last = time.monotonic()
                answer.first = answer.first or answer.last
                if chunk.reasoning and reasoning is not None:
                    _write(reasoning, (_DIM if dim and not is_dim else ""), chunk.reasoning)
                    is_dim = True
                if chunk.text:
                    if is_dim and reasoning is not None:
                        _write(reasoning, _PLAIN if dim else "", "\n\n")
                        is_dim = False
                    answer.text += chunk.text
                    _write(out, "", chunk.text)
    except KeyboardInterrupt:
        answer.was_stopped = True
    finally:
        if is_dim and dim and reasoning is not None:
            _write(reasoning, _PLAIN, "")
    return answer


def _write(out: IO[str], escape: str, text: str) -> None:
    is_terminal = out.isatty()
    out.write(escape + (text.translate(_CONTROLS) if is_terminal else text))
    out.flush()


def use_utf8() -> None:
    """Let what cannot be encoded be replaced: an answer may hold any character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
