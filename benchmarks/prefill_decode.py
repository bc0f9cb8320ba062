"""Prefill and decode apart, shown once: engine A computes prompts, engine B goes on with them.

    python -P benchmarks/prefill_decode.py

A is asked for one token of each prompt. B gets the same requests with that token as what has been
delivered (Request.resume), as after the death of an engine, and writes the rest. There are two ways
to hand a prompt over:

    by recompute  nothing passes but tokens: B computes the prompt again. It is what happens if
                  blocks are gone, and says what the other way saves.
    by blocks     both engines keep evicted blocks in one folder (a connector of four methods). A's
                  cache is small, so each prompt evicts the one before, which goes to host memory
                  and then to the folder, by the hashes of its blocks; B finds them by these.

Either way the tokens are those of one engine that does everything, which is checked. So the folder
is a hint: nothing has to be leased, and nothing is wrong if a file is missing. What is measured is
the time of B's first token. There is no scheduler for two pools here: whether it is worth having
one, `quire plan` does not say either.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import abc
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from small_engine import make_core, make_request, small_qwen3

from quire.engine.core.engine_core import EngineCore
from quire.engine.request import Request

FOLDER = "QUIRE_SHARED_BLOCKS"
"""The variable that names the folder of both engines."""


class SharedFolder:
    """Implements BlockStore: a file for each block, by its hash, in a folder that engines share.
    Nothing is ever dropped, which a store for more than a demonstration would have to do."""

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self._folder, self._record_bytes = folder, record_bytes

    def _path(self, own_hash: bytes) -> Path:
        return self._folder / own_hash.hex()

    def contains(self, hashes: abc.Sequence[bytes]) -> list[bool]:
        return [self._path(one).exists() for one in hashes]

    def load(self, own_hash: bytes, into: memoryview) -> bool:
        with self._path(own_hash).open("rb") as file:
            return file.readinto(into) == len(into)

    def store(self, own_hash: bytes, record: memoryview) -> list[bytes]:
        path = self._path(own_hash)
        if not record:
            path.unlink(missing_ok=True)
            return []
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(record)
        partial.replace(path)  # it appears whole, or not at all
        return []

    def close(self) -> None:
        """The files stay."""


def shared_folder(facts: Any) -> SharedFolder:
    """Make the store; `--kv-offloading-connector` names this function."""
    return SharedFolder(Path(os.environ[FOLDER]), facts.record_bytes)


class Ended(NamedTuple):
    """What an engine said of a request."""

    tokens: list[int]
    num_cached: int
    first_token_seconds: float


def run(core: EngineCore, request: Request) -> Ended:
    """Run a request by itself."""
    begin = time.perf_counter()
    core.add_request(request)
    tokens: list[int] = []
    cached, first = 0, None
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            tokens += output.token_ids
            if output.num_cached_tokens is not None:
                cached = output.num_cached_tokens
            if tokens and first is None:
                first = time.perf_counter() - begin
    assert first is not None
    return Ended(tokens, cached, first)


def begin(a: EngineCore, requests: list[Request]) -> list[tuple[int, ...]]:
    """Let A compute the prompts. Returns the first token of each."""
    begun = []
    for request in requests:
        params = replace(request.sampling_params, max_tokens=1)
        begun.append(tuple(run(a, replace(request, sampling_params=params)).tokens))
    # Two prompts more, so that all of the last one is evicted, too.
    for request in requests[:2]:
        run(a, make_request("filler", request.prompt_token_ids[::-1], 1))
    return begun


def go_on(b: EngineCore, requests: list[Request], begun: list[tuple[int, ...]]) -> list[Ended]:
    """Let B write the rest. Returns what it said, with A's tokens first."""
    ended = []
    for request, tokens in zip(requests, begun, strict=True):
        rest = run(b, replace(request, resume=(tokens,)))
        ended.append(rest._replace(tokens=[*tokens, *rest.tokens]))
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="a model of a few thousand weights")
    options = parser.parse_args()
    shape = small_qwen3()
    if options.small:
        shape = small_qwen3(512)
        shape.hidden_size, shape.num_hidden_layers, shape.intermediate_size = 64, 2, 64
        shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 4, 2, 16
        shape.layer_types = shape.layer_types[:2]
    rng = random.Random(0)
    requests = [
        make_request(
            f"request {index}",
            rng.choices(range(shape.vocab_size), k=options.prompt_len),
            options.output_len,
            temperature=1.0,
            seed=index,
        )
        for index in range(options.prompts)
    ]
    blocks = -(-(options.prompt_len + options.output_len) // 16) + 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = str(Path(folder) / "blocks")
        os.mkdir(os.environ[FOLDER])
        model = Path(folder) / "model"
        shape.save_pretrained(model)

        def engine(**config: Any) -> EngineCore:
            length = options.prompt_len + options.output_len + 1
            return make_core(
                model, load_format="dummy", device="cpu", max_model_len=length, **config
            )

        tiers = {
            "kv_offloading_size": 64 * 2**20,
            "kv_offloading_connector": f"{__name__}:shared_folder",
        }
        alone = engine(num_blocks=blocks)
        wanted = []
        for request in requests:
            alone.reset_prefix_cache()
            wanted.append(run(alone, request))
        print(f"{options.prompts} prompts of {options.prompt_len} tokens; to the first token of:")
        print_row("one engine, the whole", wanted)
        ways: dict[str, dict[str, Any]] = {"by recompute": {}, "by blocks": tiers}
        for name, config in ways.items():
            a, b = (engine(num_blocks=blocks, **config) for _ in range(2))
            begun = begin(a, requests)
            if config:
                a.close()  # what only host memory has goes to the folder
            ended = go_on(b, requests, begun)
            assert [one.tokens for one in ended] == [one.tokens for one in wanted], name
            print_row(f"B, {name}", ended)
            if config:
                b.close()
    print("the tokens are the same")


def print_row(name: str, ended: list[Ended]) -> None:
    """Print the median time, and the share of the prompts that was not computed."""
    seconds = statistics.median(one.first_token_seconds for one in ended)
    cached = sum(one.num_cached for one in ended) / len(ended)
    print(f"  {name:24} {seconds * 1e3:8.1f} ms   {cached:7.0f} tokens of a prompt found")


if __name__ == "__main__":
    main()
