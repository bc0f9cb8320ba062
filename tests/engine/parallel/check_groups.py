"""What groups of processes do when a rank dies or hangs, and over several hosts. Slow:

make test-parallel
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.engine.errors import StartupError
from quire.engine.lora import AdapterSource
from quire.engine.parallel import messages

from .. import models
from ..lora_models import save_adapter
from ..test_oracle import Reference
from ..worker_driver import make_config, make_prompts
from .groups import running_group, wait_gone
from .test_states import config_of

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("llama")
    reference = Reference(models.save_model("llama", folder))
    return folder, [reference.complete(prompt, 8) for prompt in make_prompts([5, 40, 17])]


def sockets_left() -> list[Path]:
    return [path for path in Path("/tmp").glob("quire-run-*/ranks")]


SHAPES: list[dict[str, Any]] = [
    {"tensor_parallel_size": 4},
    {"pipeline_parallel_size": 2},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_every_shape_serves(
    model: tuple[Path, list[list[int]]], shape: dict[str, int]
) -> None:
    folder, expected = model
    async with running_group(folder, **shape) as group:
        assert await group.answer() == expected
        assert not sockets_left()


OFFLOADING = {"kv_offloading_size": 2**20, "num_blocks": 9}


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "granite_4_h", "llama"])
async def test_states_adapters_and_evicted_blocks_are_those_of_one_rank(
    family: str, shape: dict[str, int], tmp_path: Path
) -> None:
    """Llama's blocks go to host memory and come back; states go nowhere."""
    has_states = family != "llama"
    make = config_of(family, stages=2) if has_states else models.FAMILIES[family]()
    base = models.build_model(make)
    base.save_pretrained(tmp_path)
    adapted = save_adapter(base, tmp_path / "late", r=4, target_modules="all-linear")
    config: dict[str, Any] = shape | ({} if has_states else OFFLOADING)
    async with running_group(tmp_path, **config, enable_lora=True) as group:
        await group.client.load_adapter(AdapterSource("late", str(tmp_path / "late")))
        for adapter, model in ((None, base), ("late", adapted), (None, base)):
            reference = Reference(model)
            expected = [reference.complete(prompt, 8) for prompt in make_prompts([5, 40, 17])]
            assert await group.answer(adapter=adapter) == expected


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
async def test_the_death_of_any_rank_starts_all_again(
    model: tuple[Path, list[list[int]]], rank: int, size: int
) -> None:
    folder, expected = model
    async with running_group(folder, tensor_parallel_size=size) as group:
        everyone = group.everyone
        work = asyncio.create_task(group.answer(60))
        await asyncio.sleep(random.random())
        everyone[rank].send_signal(signal.SIGKILL)
        await wait_gone(everyone, 1.0)
        await asyncio.wait([work])  # its streams have ended, with an error or before it
        work.exception()
        await group.wait_restarted(1)
        assert await group.answer() == expected
        assert len(group.everyone) == size and not sockets_left()


async def test_a_stopped_rank_starts_all_again(model: tuple[Path, list[list[int]]]) -> None:
    folder, expected = model
    async with running_group(folder, tensor_parallel_size=2) as group:
        for restart, rank in enumerate((1, 0), start=1):
            everyone = group.everyone
            everyone[rank].send_signal(signal.SIGSTOP)
            if rank == 0:  # nobody but its own supervisor can end it
                group.client._stall_timeout = 5.0
            await wait_gone(everyone, messages.SILENCE_MS / 1000 + 5)
            await group.wait_restarted(restart)
            assert await group.answer() == expected


async def test_a_failed_start_says_why(tmp_path: Path) -> None:
    models.FAMILIES["llama"]().save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="cannot load"):
        async with running_group(tmp_path, tensor_parallel_size=2):
            pass


@contextlib.contextmanager
def other_host(folder: Path, **config: Any) -> Iterator[None]:
    """Run host 1 in a process, as `quire serve --node-rank 1` does."""
    code = (
        "import sys, threading, signal, os, msgspec\n"
        "from quire.engine.config import EngineConfig\n"
        "from quire.engine.parallel.host import run_host\n"
        "stop = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "config = msgspec.json.decode(sys.argv[1], type=EngineConfig)\n"
        "run_host(config, dict(os.environ), stop, log_level='info', log_format='console')\n"
    )
    given = msgspec.json.encode(make_config(folder, max_num_batched_tokens=64, **config)).decode()
    process = subprocess.Popen([sys.executable, "-P", "-c", code, given])
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_ports() -> int:
    """Return a port that is free together with the next."""
    while True:
        port = random.randrange(20_000, 60_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
            socket.create_server(("127.0.0.1", port + 1)),
        ):
            return port


async def test_a_host_with_another_secret_gets_nowhere(
    model: tuple[Path, list[list[int]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is refused, again and again, and the one that has the secret then joins."""
    folder, expected = model
    shape: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "nnodes": 2,
        "master_port": free_ports(),
    }
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("r" * 40)
    wrong.write_text("w" * 40)
    log = ""

    async def serve() -> None:
        async with running_group(folder, **shape, node_key_file=str(right)) as group:
            assert await group.answer() == expected

    serving = asyncio.create_task(serve())
    with other_host(folder, **shape, node_rank=1, node_key_file=str(wrong)):
        async with asyncio.timeout(120):
            while "was refused: is --node-key-file the same" not in log:
                assert not serving.done()
                await asyncio.sleep(0.2)
                log += capfd.readouterr().err
    with other_host(folder, **shape, node_rank=1, node_key_file=str(right)):
        await serving


@pytest.mark.parametrize("has_keys", [False, True])
async def test_two_hosts(
    model: tuple[Path, list[list[int]]], has_keys: bool, tmp_path: Path
) -> None:
    folder, expected = model
    shape: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "nnodes": 2,
        "master_addr": "127.0.0.1",
        "master_port": free_ports(),
    }
    if has_keys:
        secret = tmp_path / "key"
        secret.write_text("s" * 40)
        shape["node_key_file"] = str(secret)
    with other_host(folder, **shape, node_rank=1):
        async with running_group(folder, **shape) as group:
            assert await group.answer() == expected
            # Strangers at the port are nobody's death.
            for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100)):
                with socket.create_connection(("127.0.0.1", shape["master_port"])) as stranger:
                    stranger.sendall(greeting)
            await asyncio.sleep(0.5)
            assert await group.answer() == expected
            leader = group.everyone[0]
            leader.send_signal(signal.SIGKILL)
            await wait_gone([leader], 1.0)
            await group.wait_restarted(1)
            assert await group.answer() == expected


async def test_hosts_with_other_flags_are_refused(model: tuple[Path, list[list[int]]]) -> None:
    folder, _ = model
    shape: dict[str, Any] = {"tensor_parallel_size": 2, "nnodes": 2, "master_port": free_ports()}
    refused = pytest.raises(StartupError, match="rank 1 cannot join: its --max-num-seqs")
    with other_host(folder, **shape, node_rank=1, max_num_seqs=4), refused:
        async with running_group(folder, **shape):
            pass
