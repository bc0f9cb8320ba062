"""What a step's plan costs rank 0: its bytes, and the time to send it to all followers.

    python -P benchmarks/plan_broadcast.py --followers 1 3 7 15 63

Followers are threads of another process that only receive. No model is loaded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from quire.engine.devices.steps import HostStep
from quire.engine.parallel import messages
from quire.engine.parallel.step_plan import StepPlan, TableEntries, make_plan


def decode_plan(rows: int) -> StepPlan:
    """Return the plan of a decode step of so many rows, one in 16 of which gets a block."""
    ones: NDArray[np.int64] = np.ones(rows, dtype=np.int64)
    host = HostStep(
        order=list(range(rows)),
        sequences=[],
        starts=1000 * ones,
        lengths=ones,
        num_decodes=rows,
        max_query_len=1,
        sampling_rows=np.arange(rows),
        sampled_positions=[1001] * rows,
        num_drafts=[],
        pooled_rows=[],
        any_scored=False,
        query_start_loc=np.arange(rows + 1, dtype=np.int32),
        seq_lens=(1001 * ones).astype(np.int32),
        rows=np.arange(rows),
        tables=np.zeros((1, rows, 63), dtype=np.int32),
    )
    changes = [TableEntries(0, row, 62, [row]) for row in range(0, rows, 16)]
    return make_plan(1, host, 7 * ones, changes, [], extra_logits=[], num_fed_back=0)


def prefill_plan(tokens: int) -> StepPlan:
    """Return the plan of a step that computes one prompt of so many tokens."""
    length: NDArray[np.int64] = np.array([tokens], dtype=np.int64)
    blocks = -(-tokens // 16)
    host = HostStep(
        order=[0],
        sequences=[],
        starts=0 * length,
        lengths=length,
        num_decodes=0,
        max_query_len=tokens,
        sampling_rows=np.arange(1),
        sampled_positions=[tokens],
        num_drafts=[],
        pooled_rows=[],
        any_scored=False,
        query_start_loc=np.array([0, tokens], dtype=np.int32),
        seq_lens=length.astype(np.int32),
        rows=np.arange(1),
        tables=np.zeros((1, 1, blocks), dtype=np.int32),
    )
    changes = [TableEntries(0, 0, 0, list(range(blocks)))]
    ids: NDArray[np.int64] = np.full(tokens, 7, dtype=np.int64)
    return make_plan(1, host, ids, changes, [], extra_logits=[], num_fed_back=0)


def receive(address: str, rank: int, last: bool) -> None:
    """Join as a follower, and drop what comes; the `last` one answers, to time a round trip."""
    link = messages.make_socket(zmq.DEALER)
    link.setsockopt(zmq.IDENTITY, b"rank-%d" % rank)
    link.connect(address)
    link.send(b"")
    while data := link.recv():
        messages.decode_to_follower(data)
        if last:
            link.send(b"")


def followers(address: str, count: int) -> None:
    """Run so many followers until each has got an empty message."""
    threads = [
        threading.Thread(target=receive, args=(address, rank, rank == count))
        for rank in range(1, count + 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(plan: StepPlan, count: int, repetitions: int) -> tuple[float, float, float]:
    """Return the median microseconds of encoding a plan, of sending it to `count` followers, and
    until the last one's answer is in."""
    address = f"ipc://{Path(tempfile.mkdtemp()) / 'ranks'}"
    leader = messages.make_socket(zmq.ROUTER)
    leader.bind(address)
    command = [sys.executable, "-P", __file__, "--follow", address, str(count)]
    child = subprocess.Popen(command)
    names = [leader.recv_multipart()[0] for _ in range(count)]
    last = b"rank-%d" % count
    names.sort(key=lambda name: name == last)
    times: list[tuple[float, float, float]] = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        data = messages.encode(messages.Step(plan))
        encoded = time.perf_counter()
        for name in names:
            leader.send_multipart([name, data])
        sent = time.perf_counter()
        leader.recv_multipart()
        end = time.perf_counter()
        times.append((encoded - begin, sent - encoded, end - begin))
        time.sleep(0.002)  # as between steps
    for name in names:
        leader.send_multipart([name, b""])
    child.wait()
    leader.close()
    encoding, sending, answered = zip(*times, strict=True)
    median = statistics.median
    return 1e6 * median(encoding), 1e6 * median(sending), 1e6 * median(answered)


def main() -> None:
    """Print the bytes of plans, and the times."""
    parser = argparse.ArgumentParser(description="What a step's plan costs rank 0.")
    parser.add_argument("--followers", type=int, nargs="+", default=[1, 3, 7, 15, 63])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--follow", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow is not None:
        followers(arguments.follow[0], int(arguments.follow[1]))
        return
    for rows in arguments.rows:
        size = len(messages.encode(messages.Step(decode_plan(rows))))
        print(f"decode of {rows} rows: {size} bytes")
    for tokens in (512, 8192):
        size = len(messages.encode(messages.Step(prefill_plan(tokens))))
        print(f"prefill of {tokens} tokens: {size} bytes")
    plan = decode_plan(256)
    for count in arguments.followers:
        encoding, sending, answered = measure(plan, count, arguments.repetitions)
        print(
            f"{count} followers: encode {encoding:.0f} µs, send {sending:.0f} µs, "
            f"answered after {answered:.0f} µs"
        )


if __name__ == "__main__":
    main()
