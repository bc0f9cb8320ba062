"""Compare quire with llama.cpp on the same GGUF files.

    python benchmarks/against_llama.py --llama FOLDER SmolLM2-135M-Instruct.Q4_1.gguf
        [--types Q4_0] [--threads 2] [--turns 3] [--concurrency 1 4 16] [--skip-perplexity]
        [--drafts]

FOLDER has llama.cpp's programs. For each type of --types its own llama-quantize first makes a file
of the given one, which is taken as it is too. Then for each file both servers are started, and
asked in turns by `quire bench serve`: random prompts of 128 tokens and 64 new ones, greedily, at
several requests at once; and the time to the first token of prompts of 512. quire drafts nothing,
unless `--drafts` leaves it its default. At last both compute the perplexity of this repository's
documents, of the second half of each window of 512 tokens, as llama-perplexity counts. What is
reported is the median of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from perplexity import documents

HERE = Path(__file__).resolve().parent
QUIRE = [str(Path(sys.executable).with_name("quire"))]
LLAMA_PORT, QUIRE_PORT = 8201, 8202
WINDOWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=["Q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--skip-perplexity", action="store_true")
    parser.add_argument("--drafts", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [arguments.file]
        for kind in arguments.types:
            files.append(requantised(arguments.llama, arguments.file, kind, Path(folder)))
        for file in files:
            print(f"== {file.name}", flush=True)
            compare_speed(arguments, file, Path(folder))
            if not arguments.skip_perplexity:
                compare_perplexity(arguments, file, Path(folder))


def llama(folder: Path, name: str, *options: object) -> tuple[list[str], dict[str, str]]:
    """Return the command of one of llama.cpp's programs, and its environment."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    return [str(folder / name), *map(str, options)], environment


def requantised(folder: Path, file: Path, kind: str, target: Path) -> Path:
    """Return a file of another type. Embedding and head have it, too."""
    made = target / f"{file.name.split('.')[0]}.{kind}.gguf"
    types = ("--token-embedding-type", kind, "--output-tensor-type", kind)
    command, environment = llama(
        folder, "llama-quantize", "--allow-requantize", *types, file, made, kind
    )
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return made


def compare_speed(arguments: argparse.Namespace, file: Path, folder: Path) -> None:
    threads = arguments.threads
    command, environment = llama(
        arguments.llama,
        "llama-server",
        *("-m", file, "--port", LLAMA_PORT, "-t", threads, "-c", 16384, "-np", 16, "--no-webui"),
    )
    served = [*QUIRE, "serve", str(file), "--port", str(QUIRE_PORT), "--num-threads", str(threads)]
    served += ["--max-model-len", "1024", "--kv-cache-memory", "1GiB"]
    served += [] if arguments.drafts else ["--speculation", "off"]
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with open(folder / "servers.log", "ab") as log:
        servers = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log),
            subprocess.Popen(served, stdout=log, stderr=log),
        ]
        try:
            ports = {"llama.cpp": LLAMA_PORT, "quire": QUIRE_PORT}
            for port in ports.values():
                wait_for(port)
            for turn in range(arguments.turns):
                for number in arguments.concurrency:
                    for name, port in ports.items():
                        result = bench(port, number, max(6, 4 * number), 128, 64, turn, folder)
                        found[f"{number} at once", name].append(result)
                for name, port in ports.items():
                    found["512 tokens", name].append(bench(port, 1, 5, 512, 2, turn, folder))
        finally:
            for server in servers:
                server.send_signal(signal.SIGTERM)
            for server in servers:
                server.wait(timeout=60)
    report(found)


def wait_for(port: int) -> None:
    """Return once the server is ready. Raises TimeoutError after five minutes."""
    for _ in range(600):
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            pass
    raise TimeoutError(f"nothing is ready on port {port}")


def bench(
    port: int, at_once: int, prompts: int, length: int, new: int, seed: int, folder: Path
) -> dict[str, float]:
    """Run quire's client, and return tokens/s and the mean milliseconds to the first token and
    between two. Raises RuntimeError if a request failed."""
    result = folder / "result.json"
    options: dict[str, Any] = {
        "--base-url": f"http://127.0.0.1:{port}",
        "--vocab-size": 49000,
        "--num-prompts": prompts,
        "--max-concurrency": at_once,
        "--random-input-len": length,
        "--random-output-len": new,
        "--seed": 100 * seed + at_once,
        "--result-filename": result,
    }
    command = [*QUIRE, "bench", "serve", "--save-result"]
    for name, value in options.items():
        command += [name, str(value)]
    subprocess.run(command, check=True, capture_output=True)
    (run,) = json.loads(result.read_text(encoding="utf-8"))["runs"]
    if run["errors"]:
        raise RuntimeError(f"requests failed: {run['errors']}")
    return {
        "tokens": run["output_tokens_per_s"],
        "ttft": run["latency_ms"]["ttft"]["mean"],
        "tpot": run["latency_ms"]["tpot"]["mean"],
    }


def report(found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    for load in dict.fromkeys(load for load, _ in found):
        line, values = f"{load:12}", {}
        for name in ("llama.cpp", "quire"):
            turns = found[load, name]
            middle = {
                key: statistics.median(turn[key] for turn in turns)
                for key in ("tokens", "ttft", "tpot")
            }
            values[name] = middle
            line += (
                f"  {name}: {middle['tokens']:7.1f} tokens/s, TTFT "
                f"{middle['ttft']:7.1f} ms, TPOT {middle['tpot']:6.2f} ms"
            )
        ours, theirs = values["quire"], values["llama.cpp"]
        speed = ours["tokens"] / theirs["tokens"]
        wait = ours["ttft"] / theirs["ttft"]
        print(f"{line}  tokens/s {speed:.2f}x, TTFT {wait:.2f}x", flush=True)


def compare_perplexity(arguments: argparse.Namespace, file: Path, folder: Path) -> None:
    text = folder / "documents.txt"
    text.write_text(documents(), encoding="utf-8")
    common = ("-c", 512, "-b", 512, "--chunks", WINDOWS, "-t", arguments.threads)
    command, environment = llama(
        arguments.llama, "llama-perplexity", "-m", file, "-f", text, *common
    )
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    theirs = re.findall(r"PPL = ([\d.]+)", done.stdout + done.stderr)[-1]
    command = [sys.executable, str(HERE / "perplexity.py"), str(file), "--second-half"]
    command += ["--windows", str(WINDOWS), "--threads", str(arguments.threads)]
    ours = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]
    print(f"perplexity    llama.cpp: {theirs}  quire: {ours}", flush=True)


if __name__ == "__main__":
    main()
