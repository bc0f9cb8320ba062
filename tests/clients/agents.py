"""A server with a scripted model, for agents that run other people's whole loops.

An agent's prompt is longer than the demo model's context, and the demo model calls no tools of an
agent. So the model is a script that reads the prompt, and all of the server around it is real.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from quire.engine.request import Request
from quire.server.text.tokenizer import Tokenizer

from ..server.conftest import make_app
from ..server.fakes import REASONING_TEMPLATE, FakeEngineClient, Script, byte_tokenizer, ids
from .conftest import KEY

CONTEXT = 1_000_000
"""Tokens of the context; a token is a byte."""

Answer = Callable[[str], str]
"""Returns the model's text for the text of a prompt."""


class Model:
    """A model whose text is what `answer` returns. `prompts` are those that it was given."""

    def __init__(self, answer: Answer) -> None:
        self.prompts: list[str] = []
        self._answer = answer
        self.tokenizer: Tokenizer = byte_tokenizer(REASONING_TEMPLATE)
        self.engine = FakeEngineClient(
            self._script, max_model_len=CONTEXT, num_blocks=CONTEXT // 16
        )

    def _script(self, request: Request, choice: int) -> Script:
        token_bytes = self.tokenizer.token_bytes
        self.prompts.append(b"".join(map(token_bytes, request.prompt_token_ids)).decode())
        return Script(ids(self._answer(self.prompts[-1])), chunk=7)


@contextmanager
def serving(model: Model, name: str) -> Iterator[str]:
    """Serve `model` under `name`; yield the server's address."""
    app = make_app(
        model.engine,
        model.tokenizer,
        served_model_name=(name,),
        api_key=(KEY,),
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="h11", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run an agent in `folder` with no other settings than these; return what it prints."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"HOME": str(home)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
