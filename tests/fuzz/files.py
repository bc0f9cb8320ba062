"""Change grammars, chat templates, GGUF and safetensors files at random, within bounds.

    python -m tests.fuzz.files --cases 20000

Each kind runs in a process of its own, whose address space is bounded, and an alarm bounds the time
of each case. A case must succeed or raise the error that is declared for its kind, in one line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 20
"""What one case may take, on a machine with much else to do."""
MEMORY = 3 * 2**30
"""Bytes of address space that a process may take beyond what it has after its imports."""
Case = Callable[[random.Random], None]
"""Makes and tries one changed input; raises the declared error or nothing."""


class TooLong(Exception):
    """A case took more than SECONDS."""


def _changed(rng: random.Random, data: bytes, alphabet: bytes = b"") -> bytes:
    """Return the data with a few bytes changed, cut, removed or repeated."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(new) + 1)
        match rng.randrange(6):
            case 0:
                new[place : place + 1] = bytes([rng.choice(alphabet or range(256))])
            case 1:
                del new[place : place + rng.randrange(20)]
            case 2:
                new[place:place] = new[place : place + rng.randrange(40)]
            case 3:
                number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1])
                new[place : place + 8] = (
                    str(number).encode() if alphabet else struct.pack("<Q", number)
                )
            case 4:
                other = rng.randrange(len(new) + 1)
                new[place:place] = new[other : other + rng.randrange(30)]
            case _:
                if rng.random() < 0.1:
                    del new[place:]
    return bytes(new)


_PRINTABLE = bytes(range(32, 127))
_GRAMMARS = (
    ("json", '{"type":"object","properties":{"a":{"type":"integer","minimum":3},'
     '"b":{"enum":["x",1]}},"required":["a"],"additionalProperties":false}'),
    ("json", '{"anyOf":[{"type":"array","items":{"$ref":"#/$defs/n"},"maxItems":4}],'
     '"$defs":{"n":{"type":"string","pattern":"^a+b?$","maxLength":9}}}'),
    ("regex", r"(a|b)*c{2,5}[^x-z]\d+(foo|bar)?"),
    ("choice", '["yes", "no", "maybe \\u00e9"]'),
    ("grammar", 'start: expr\nexpr: term (("+"|"-") term)*\nterm: /[0-9]+/ | "(" expr ")"'),
    ("grammar", 'root ::= item+ "end"\nitem ::= [a-z]{1,4} " " | "(" root ")"'),
    ("structural_tag", '{"triggers":["<f"],"structures":[{"begin":"<f>",'
     '"schema":{"type":"null"},"end":"</f>"}]}'),
)  # fmt: skip


def grammars(_: Path) -> tuple[Case, type[Exception]]:
    """Compile changed grammars of all kinds."""
    from quire.engine.grammar.compile import GrammarCompileError, compile_grammar, make_tokenizer
    from quire.engine.request import GrammarSpec

    demo = Path(__file__).parents[2] / "configs/demo"
    tokenizer = make_tokenizer((demo / "tokenizer.json").read_text("utf-8"), 1600, [2])

    def case(rng: random.Random) -> None:
        kind, text = rng.choice(_GRAMMARS)
        changed = _changed(rng, text.encode(), _PRINTABLE).decode("utf-8", "replace")
        compile_grammar(tokenizer, GrammarSpec(kind, changed))  # type: ignore[arg-type]

    return case, GrammarCompileError


def templates(_: Path) -> tuple[Case, type[Exception]]:
    """Render conversations with changed chat templates."""
    from quire.engine.errors import InvalidRequestError

    from ..server.fakes import byte_tokenizer
    from ..server.text.templates import FAMILIES

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<|im_end|> hi {{ 7 * 7 }}"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    chats = byte_tokenizer().templates

    def case(rng: random.Random) -> None:
        text = rng.choice(list(FAMILIES.values()))
        changed = _changed(rng, text.encode(), _PRINTABLE).decode("utf-8", "replace")
        settings = {"add_generation_prompt": True}
        chats.render(changed, messages, settings, tools if rng.random() < 0.3 else None)

    return case, InvalidRequestError


def gguf(folder: Path) -> tuple[Case, type[Exception]]:
    """Read changed GGUF files as the engine does."""
    from quire.engine.checkpoints.checkpoint import open_checkpoint
    from quire.engine.checkpoints.gguf_header import read_header
    from quire.engine.errors import StartupError

    from ..engine.checkpoints.gguf_files import write_model
    from ..engine.worker_driver import make_config

    path = folder / "whole.gguf"
    write_model(path, "qwen2", "Q4_0")
    content = path.read_bytes()
    length = min(tensor.offset for tensor in read_header(path).tensors.values())
    file = folder / "changed.gguf"

    def case(rng: random.Random) -> None:
        file.write_bytes(_changed(rng, content[:length]) + content[length:])
        checkpoint = open_checkpoint(make_config(file))
        assert checkpoint is not None
        checkpoint.hf_config()

    return case, StartupError


def safetensors(folder: Path) -> tuple[Case, type[Exception]]:
    """Load models whose weights or configuration are changed, as the engine does."""
    from quire.engine.errors import StartupError

    from ..engine.models import save_model
    from ..engine.worker_driver import load

    save_model("llama", folder)
    names = ("model.safetensors", "config.json")
    whole = {name: (folder / name).read_bytes() for name in names}

    def case(rng: random.Random) -> None:
        for name in names:
            (folder / name).write_bytes(whole[name])
        name = rng.choice(names)
        head = len(whole[name])
        if name == "model.safetensors":
            head = 8 + int.from_bytes(whole[name][:8], "little")
        text = whole[name][:head]
        alphabet = _PRINTABLE if rng.random() < 0.8 else b""
        (folder / name).write_bytes(_changed(rng, text, alphabet) + whole[name][head:])
        load(folder)

    return case, StartupError


KINDS = {make.__name__: make for make in (grammars, templates, gguf, safetensors)}


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def run_kind(kind: str, cases: int, seed: int) -> dict[str, Any]:
    """Run the cases of a kind in this process; return counts and what is wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        case, declared = KINDS[kind](Path(folder))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(cases):
            began = time.monotonic()
            try:
                with _alarm():
                    case(random.Random(f"{seed} {number}"))
                counts["accepted"] += 1
            except declared as error:
                counts["refused"] += 1
                if "\n" in str(error):
                    wrong.append(f"case {number} of seed {seed}: several lines: {error}")
            except Exception as error:  # whatever is raised here is what is looked for
                wrong.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"counts": counts, "wrong": wrong, "slowest": slowest, "peak_mb": peak}


def run_apart(kind: str, cases: int, seed: int) -> dict[str, Any]:
    """Run the cases of a kind in a process of its own. If that dies, this is what is wrong."""
    command = [sys.executable, "-m", "tests.fuzz.files", "--kind", kind]
    command += ["--cases", str(cases), "--seed", str(seed)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if done.returncode != 0:
        wrong = [f"the process ended with code {done.returncode}"]
        return {"counts": {}, "wrong": wrong, "slowest": 0.0, "peak_mb": 0.0}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Run the command line; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only this one, in this process")
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(run_kind(options.kind, options.cases, options.seed)))
        return 0
    failed = 0
    for kind in KINDS:
        # Loading a model takes a hundred times as long as any other case.
        cases = options.cases if kind != "safetensors" else max(1, options.cases // 20)
        result = run_apart(kind, cases, options.seed)
        counts = ", ".join(f"{number:,} {name}" for name, number in result["counts"].items())
        slowest, peak = result["slowest"], result["peak_mb"]
        print(f"{kind}: {counts}; slowest {slowest:.1f} s, peak {peak:.0f} MB", flush=True)
        for line in result["wrong"][:20]:
            print(f"  {line[:400]}")
        failed += len(result["wrong"])
    print(f"wrong: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
