"""Measure what drafts save, by task and by the number of requests at once.

    python benchmarks/speculation.py smollm2 [--concurrency 1 16] [--draft-model PATH] [--turns 3]
    python benchmarks/speculation.py                     # a 30M-parameter shape, random weights
    python benchmarks/speculation.py smollm2 --base-url http://127.0.0.1:8000 --pid PID

The first two run the engine without HTTP on one thread of the CPU, once with drafts and once
without, in turns, and compare the CPU time of the process from the last first token to the end: the
least of all turns. The tokens must be equal. The tasks are those for which drafts are made: copying
a text, editing code, filling a schema, a right `prediction`; and prose, which nothing foresees.
Random weights only have a right prediction and nothing to foresee.

The third asks a server of any make the same tasks as chats, and reports tokens a second and the CPU
time of the server's processes. So quire and others can be compared, one after the other, with and
without their drafts:

    quire serve smollm2 --num-threads 2 --max-model-len 4096 [--speculation off] --port 8001
    llama-server -m SmolLM2-135M-Instruct.Q4_1.gguf -t 2 -c 65536 -np 16 --port 8002
        [--spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-ngram-simple-size-m 15]
        [--spec-type ngram-map-k | ngram-mod | ngram-cache]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from small_engine import make_core, make_random_core, small_qwen3

from quire.engine.checkpoints.gguf_tokenizer import tokenizer_folder
from quire.engine.core.engine_core import EngineCore
from quire.engine.request import GrammarSpec, Request
from quire.engine.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")[:1500]
CODE = (ROOT / "engine" / "scheduling" / "policy.py").read_text(encoding="utf-8")[:1800]
FIELDS = ("first_name", "family_name", "city_of_birth", "occupation", "favourite_food")
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 20} for name in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}
MAX_TOKENS = 160
OPTIONS = {"num_threads": 1, "num_blocks": 1600, "max_num_seqs": 16, "enable_prefix_caching": False}


class Task(NamedTuple):
    """A prompt and how its answer is sampled; a `predicted` one has its own answer as prediction,
    as it is without drafts."""

    name: str
    prompt: str
    sampling: dict[str, float]
    schema: dict[str, Any] | None = None
    predicted: bool = False


EDIT = f"Rewrite this code and rename Policy to Rule:\n{CODE}"
TASKS = (
    Task("copy", f"Copy the text below word for word.\n\n{TEXT}\n\nCopy:", {"temperature": 0.0}),
    Task("edit code", EDIT, {"temperature": 0.0}),
    Task("schema", "Make up a person.", {"temperature": 0.7, "top_p": 0.9}, SCHEMA),
    Task("prediction", EDIT, {"temperature": 0.0}, predicted=True),
    Task(
        "prose",
        "Write a story about a lighthouse keeper.",
        {"temperature": 0.8, "top_p": 0.95},
    ),
)


class Run(NamedTuple):
    """What one batch of requests gave: tokens of each, and CPU milliseconds for each token after
    the first ones."""

    answers: list[list[int]]
    ms: float


def run(core: EngineCore, requests: list[Request]) -> Run:
    """Run requests together to their ends."""
    for request in requests:
        core.add_request(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    begin, early = None, 0
    while core.has_work:
        for output in core.step().outputs:
            answers[output.request_id] += output.token_ids
        if begin is None and all(answers.values()):
            begin, early = time.process_time(), sum(map(len, answers.values()))
    assert begin is not None
    decoded = sum(map(len, answers.values())) - early
    return Run(list(answers.values()), (time.process_time() - begin) / max(decoded, 1) * 1e3)


class Bench:
    """Two engines of one model, with drafts and without, and the prompts of the tasks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, draft = arguments.model, arguments.draft_model
        speculation = {"speculation": "off"}, {"speculative_model": draft}
        if model is None:
            shape = small_qwen3()
            self._engines = [make_random_core(shape, **OPTIONS, **one) for one in speculation]
            self._encode = self._random_prompt
            self.tasks = [task for task in TASKS if task.name in ("prediction", "prose")]
        else:
            from transformers import AutoTokenizer

            options = OPTIONS | {"device": "cpu", "max_model_len": 4096}
            self._engines = [make_core(model, **options, **one) for one in speculation]
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(model))
            self._encode = self._chat
            self.tasks = list(TASKS)
        self._count = 0

    def _random_prompt(self, task: Task) -> list[int]:
        chance = random.Random(task.name)
        return [chance.randrange(3, 32000) for _ in range(300)]

    def _chat(self, task: Task) -> list[int]:
        messages = [{"role": "user", "content": task.prompt}]
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        token_ids: list[int] = self._tokenizer(text).input_ids
        return token_ids

    def _requests(self, task: Task, number: int, predicted: list[list[int]]) -> list[Request]:
        self._count += 1
        prompt = tuple(self._encode(task))
        return [
            Request(
                request_id=f"{task.name} {self._count} {index}",
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=MAX_TOKENS, seed=index, **task.sampling),
                arrival_time=0.0,
                grammar=None if task.schema is None else GrammarSpec("json", _dump(task.schema)),
                prediction=tuple(predicted[index]) if predicted else (),
            )
            for index in range(number)
        ]

    def measure(self, task: Task, number: int, turns: int) -> str:
        """Return a row of the table. Raises RuntimeError if drafts changed a token."""
        plain, drafted = self._engines
        predicted = run(plain, self._requests(task, number, [])).answers if task.predicted else []
        drafting = drafted._scheduler._drafting  # its counters are not in EngineStats by turn
        assert drafting is not None
        counts = drafting.speculator.counts
        before = counts.draft_tokens, counts.accepted_tokens
        best = [float("inf")] * 2
        for _ in range(turns):
            found = [run(one, self._requests(task, number, predicted)) for one in self._engines]
            if found[0].answers != found[1].answers:
                raise RuntimeError(f"{task.name}: drafts changed the tokens")
            best = [min(old, new.ms) for old, new in zip(best, found, strict=True)]
        drafts, accepted = counts.draft_tokens - before[0], counts.accepted_tokens - before[1]
        return (
            f"| {task.name} | {number} | {best[0]:.2f} | {best[1]:.2f} | {best[0] / best[1]:.2f} | "
            f"{drafts // turns}, {accepted // turns} |"
        )


def _dump(value: Any) -> str:
    return json.dumps(value)


# -- a server --------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of all processes below it."""
    seconds = 0.0
    for process in _family(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


class Server:
    """A server that is asked the tasks as chats."""

    def __init__(self, url: str, model: str, pid: int | None) -> None:
        self._url, self._model, self._pid = url.rstrip("/"), model, pid
        self._asked = count()

    def _ask(self, task: Task, seed: int, prediction: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": task.prompt}],
            "max_tokens": MAX_TOKENS,
            "seed": seed,
            # Otherwise a task's second turn would be drafted from the answer of its first.
            "cache_salt": f"{time.time()} {next(self._asked)}",
            **task.sampling,
        }
        if task.schema is not None:
            named = {"name": "person", "schema": task.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if prediction:
            body["prediction"] = {"type": "content", "content": prediction}
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=1200) as answer:
            decoded: dict[str, Any] = json.load(answer)
        return decoded

    def measure(self, task: Task, number: int, turns: int) -> str:
        """Return a row of the table: the best tokens a second of all turns, and CPU time."""
        first = self._ask(task, 0, "")  # which also brings the prompt into the server's cache
        prediction = first["choices"][0]["message"]["content"] if task.predicted else ""
        speed, cpu = 0.0, float("inf")
        with ThreadPoolExecutor(number) as pool:
            for _ in range(turns):
                used = cpu_seconds(self._pid) if self._pid is not None else 0.0
                begin = time.perf_counter()
                asked = [pool.submit(self._ask, task, seed, prediction) for seed in range(number)]
                answers = [one.result() for one in asked]
                seconds = time.perf_counter() - begin
                tokens = sum(one["usage"]["completion_tokens"] for one in answers)
                speed = max(speed, tokens / seconds)
                if self._pid is not None:
                    cpu = min(cpu, (cpu_seconds(self._pid) - used) / tokens * 1e3)
        return f"| {task.name} | {number} | {speed:.1f} | {cpu:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="folder, GGUF file or smollm2; random without")
    parser.add_argument("--draft-model", metavar="PATH", help="also draft by this model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS])
    parser.add_argument("--base-url", help="ask this server instead")
    parser.add_argument("--pid", type=int, help="the server's process, for its CPU time")
    arguments = parser.parse_args()
    bench: Bench | Server
    if arguments.base_url is None:
        bench, tasks = (made := Bench(arguments)), made.tasks
        print("| task | requests | ms a token without | with drafts | ratio | drafted, accepted |")
        print("|---|---|---|---|---|---|")
    else:
        bench, tasks = Server(arguments.base_url, arguments.model, arguments.pid), list(TASKS)
        print("| task | requests | tokens/s | CPU ms a token |")
        print("|---|---|---|---|")
    for number in arguments.concurrency:
        for task in tasks:
            if arguments.tasks is None or task.name in arguments.tasks:
                print(bench.measure(task, number, arguments.turns), flush=True)


if __name__ == "__main__":
    main()
