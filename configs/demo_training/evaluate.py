"""Measure how well a trained demo model answers: `python configs/demo_training/evaluate.py DIR`."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from manual import load_facts, vary
from skills import (
    UNKNOWN_ANSWERS,
    is_held_out_sum,
    json_turn,
    sum_answer,
    unknown_turn,
)
from tool_calls import tool_turn
from transformers import AutoModelForCausalLM, AutoTokenizer

Case = tuple[list[dict[str, Any]], list[dict[str, Any]] | None, tuple[str, ...]]
"""The messages of a question, the tools that are offered, and the accepted answers."""

SAMPLES = (
    "Who are you?", "what is a kv block", "How do I set an API key?", "hey how to change the port",
    "Tell me a story about a fox", "What is 27 + 58?", "748 + 579", "What is the capital of Peru?",
    "Say hello world", "What happens when memory runs out?", "hello", "explain copy on write pls",
)  # fmt: skip


def _question(text: str, *answers: str) -> Case:
    return [{"role": "user", "content": text}], None, answers


def cases(few: bool) -> dict[str, list[Case]]:
    """Return groups of questions, nearly all unseen in training, with their accepted answers."""
    rng, facts = random.Random("evaluation"), load_facts()
    size = 20 if few else 300
    held = [(q, fact.answer) for fact in facts for q in fact.held_out]
    unseen = [_question(q, fact.answer) for fact in facts for q in fact.unseen]
    groups = {
        "held-out phrasings": [_question(q, a) for q, a in rng.sample(held, size)],
        "held-out phrasings, varied": [
            _question(vary(rng, q), a) for q, a in rng.sample(held, size)
        ],
        "hand-written unseen questions": unseen[:size] if few else unseen,
        "unknown topics": [
            _question(unknown_turn(rng)[0]["content"], *UNKNOWN_ANSWERS) for _ in range(size)
        ],
    }
    for digits in (2, 3):
        pairs: list[tuple[int, int]] = []
        while len(pairs) < size:
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            if is_held_out_sum(a, b):
                pairs.append((a, b))
        for operator, name in (("+", "sums"), ("-", "differences")):
            groups[f"held-out {name} of {digits} digits"] = [
                _question(f"What is {a} {operator} {b}?", sum_answer(a, b, operator))
                for a, b in ((max(p), min(p)) for p in pairs)
            ]
    products = [(rng.randrange(2, 13), rng.randrange(2, 13)) for _ in range(size // 3)]
    groups["products"] = [
        _question(f"What is {a} * {b}?", sum_answer(a, b, "*")) for a, b in products
    ]
    groups["json"] = []
    groups["tool calls"] = []
    for _ in range(size // 3):
        ask, answer = json_turn(rng)
        groups["json"].append(_question(ask["content"], answer["content"]))
        messages, tools = tool_turn(rng)
        call = json.dumps(messages[1]["tool_calls"][0]["function"])
        groups["tool calls"].append(([messages[0]], tools, (f"<tool_call>\n{call}\n</tool_call>",)))
    return groups


class Answerer:
    """Answers questions greedily, in batches, through the chat template."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def answer(self, batch: list[Case], max_new_tokens: int = 120) -> list[str]:
        """Return one answer per case, as text without special tokens."""
        prompts = [
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
            for messages, tools, _ in batch
        ]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False,
            return_token_type_ids=False,
        ).to(self.device)  # fmt: skip
        out = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


def evaluate(folder: Path, device: torch.device, *, few: bool = False) -> dict[str, float]:
    """Return by group the share of answers that equal an accepted one; print misses and samples."""
    answerer = Answerer(folder, device)
    scores: dict[str, float] = {}
    for name, group in cases(few).items():
        right, missed = 0, []
        for at in range(0, len(group), 256):
            batch = group[at : at + 256]
            for case, answer in zip(batch, answerer.answer(batch), strict=True):
                if answer.strip() in case[2]:
                    right += 1
                else:
                    missed.append((case[0][-1]["content"], answer))
        scores[name] = round(right / len(group), 4)
        print(f"{name}: {right}/{len(group)} exact", flush=True)
        for question, answer in missed[:6]:
            print(f"    {question!r}\n      -> {answer!r}")
    print("samples:")
    asked = [_question(text) for text in SAMPLES]
    for text, answer in zip(SAMPLES, answerer.answer(asked, 200), strict=True):
        print(f"  {text}\n    {answer}", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--few", action="store_true")
    args = parser.parse_args()
    evaluate(args.folder, torch.device(args.device), few=args.few)


if __name__ == "__main__":
    main()
