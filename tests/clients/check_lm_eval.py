"""lm-eval's `local-completions`, compared with transformers on tasks that this file makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from .conftest import KEY, MODEL, command

DEMO = Path(__file__).resolve().parents[2] / "configs/demo"
SUMS = [(12, 30), (7, 8), (41, 25), (3, 96), (50, 50), (18, 64), (77, 11), (9, 9)]
STORY = "Once upon a time there was a fox named Anna. She lived in the forest, and found a key."
STOP, MAX_TOKENS = "=", 24
ACCURACY = 1e-4
"""Tolerance in nats of a log-likelihood summed over its tokens. Both sides compute in float32."""


def _row(a: int, b: int) -> dict[str, Any]:
    question = f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n"
    return {
        "question": question,
        "begun": f"{question}{a} + {b} =",
        "choices": [f" {a + b}", f" {a + b + 1}", " tiny"],
        "label": 0,
        "answer": f"{a} + {b} ",
        "story": STORY[: 40 + a],
    }


TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begun}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", STOP],  # as many as HumanEval's
            "max_gen_toks": MAX_TOKENS,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def _write_tasks(folder: Path) -> None:
    """Fill a folder for --include_path with a data set and tasks in JSON, a subset of YAML."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(_row(a, b)) for a, b in SUMS), encoding="utf-8")
    for name, fields in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "target_delimiter": "",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | fields), encoding="utf-8")


def _evaluate(
    server: str, folder: Path, flags: list[str], model_args: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Run lm_eval; return its samples by task."""
    _write_tasks(folder)
    url = f"{server}/v1/completions"
    fields = {"model": MODEL, "base_url": url, "max_retries": 1, **model_args}
    done = subprocess.run(
        [command("lm_eval"), "run", "--model", "local-completions", "--log_samples"]
        + ["--model_args", ",".join(f"{name}={value}" for name, value in fields.items())]
        + ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
        + ["--output_path", str(folder / "out"), *flags],
        env=os.environ
        | {"OPENAI_API_KEY": KEY, "HF_HOME": str(folder / "hf")}
        | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = {}
    for name in TASKS:
        (path,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples[name]) == len(SUMS)
    return samples


class Oracle:
    """The same model in transformers, given whole prompts, without a KV cache."""

    def __init__(self) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            DEMO, dtype=torch.float32
        )
        self.end: int = self.tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of `continuation`, and whether it is the greedy choice."""
        with torch.no_grad():
            logits = self.model(torch.tensor([context + continuation])).logits[0]
        logprobs = logits[len(context) - 1 : -1].log_softmax(-1)
        chosen = torch.tensor(continuation)
        total = logprobs.gather(1, chosen[:, None]).double().sum()
        return float(total), bool((logprobs.argmax(-1) == chosen).all())

    def greedy(self, prompt: str) -> str:
        ids = torch.tensor([self.ids(prompt)])
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
        )
        text: str = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.mark.parametrize(
    ("flags", "model_args"),
    [
        (["--batch_size", "4"], {"tokenizer_backend": "huggingface", "tokenizer": DEMO}),
        ([], {"auth_token": KEY, "num_concurrent": 4}),  # uses /tokenizer_info and /tokenize
    ],
    ids=["local tokenizer, batches", "the server's tokenizer, at once"],
)
def test_scores_and_texts_equal_those_of_transformers(
    server: str, oracle: Oracle, tmp_path: Path, flags: list[str], model_args: dict[str, Any]
) -> None:
    samples = _evaluate(server, tmp_path, flags, model_args)
    greedy = []
    for sample in samples["choose"]:
        context = oracle.ids(sample["doc"]["begun"])
        for choice, [[score, is_greedy]] in zip(
            sample["doc"]["choices"], sample["resps"], strict=True
        ):
            whole = oracle.ids(sample["doc"]["begun"] + choice)
            expected, greedy_there = oracle.score(context, whole[len(context) :])
            assert float(score) == pytest.approx(expected, abs=ACCURACY, rel=0)
            assert is_greedy == str(greedy_there)
            greedy.append(greedy_there)
    assert True in greedy and False in greedy
    for sample in samples["roll"]:
        [[score]] = sample["resps"]
        expected, _ = oracle.score([oracle.end], oracle.ids(sample["doc"]["story"]))
        assert float(score) == pytest.approx(expected, abs=ACCURACY, rel=0)
    for sample in samples["generate"]:
        text, stop, _ = oracle.greedy(sample["doc"]["question"]).partition(STOP)
        assert stop and sample["resps"] == [[text]]
    assert sum(sample["acc"] for sample in samples["choose"]) > len(SUMS) / 2
    assert sum(sample["exact_match"] for sample in samples["generate"]) > len(SUMS) / 2
