"""Generate the demo model's corpus: seeded, in shards, packed as token ids.

`python configs/demo_training/corpus.py --out DIR --shards 64` writes, for each shard, an .npz with
  tokens  uint16 [num_tokens]     the documents one after the other, each ended by <|endoftext|>
  target  bool   [num_tokens]     whether the model learns to predict the token
  starts  int64  [num_documents]  index of each document's first token
Shard i depends only on the seed, not on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from manual import Fact, ask, load_facts, vary
from skills import Message, echo_turn, json_turn, small_talk_turn, sum_turn, turn, unknown_turn
from stories import plain_story, story_turn
from tokenizers import Tokenizer
from tool_calls import tool_turn

TOKENIZER_PATH = Path(__file__).parents[1] / "demo" / "tokenizer.json"
END_OF_TEXT, IM_END = "<|endoftext|>", "<|im_end|>"
Segments = list[tuple[str, bool]]
"""A document as pieces of text, each with a flag: whether the model learns to write it."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Be brief.", "Answer briefly.",
    "You are quire's demo model.", "Answer in one sentence.", "You are a friendly chatbot.",
    "You are an expert on inference servers.", "Keep your answers short.", "Answer the question.",
    "You are a helpful, honest assistant. Answer in plain English.", "You are a concise assistant.",
    "Be polite and short.", "You answer questions about quire.", "You are an AI assistant.",
)  # fmt: skip
TURN_MAKERS = (sum_turn, unknown_turn, story_turn, json_turn, echo_turn, small_talk_turn)
MANUAL_SHARE, MAKER_SHARES = 48, (20, 12, 6, 5, 4, 5)
"""Weights of questions about the manual, and of the TURN_MAKERS."""


def render(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Segments:
    """Render messages as chat_template.jinja does, cut around the assistant's words."""
    prompt, segments = "", Segments()
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        system = (system + "\n\n" if system else "") + (
            "# Tools\n\nYou may call one or more functions. Their signatures, as JSON:\n"
            f"<tools>{listed}\n</tools>\n\n"
            "Call a function by name with its arguments as a JSON object:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
    if system:
        prompt = f"<|im_start|>system\n{system}{IM_END}\n"
    for message in messages:
        if message["role"] == "assistant":
            segments.append((prompt + "<|im_start|>assistant\n", False))
            text = message["content"] or ""
            for call in message.get("tool_calls", []):
                body = json.dumps(call["function"], ensure_ascii=False)
                text += ("\n" if text else "") + f"<tool_call>\n{body}\n</tool_call>"
            segments.append((text + IM_END, True))
            prompt = "\n"
        elif message["role"] == "tool":
            content = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            prompt += f"<|im_start|>user{content}{IM_END}\n"
        else:
            prompt += f"<|im_start|>{message['role']}\n{message['content']}{IM_END}\n"
    return segments


def manual_turn(rng: random.Random, facts: list[Fact]) -> list[Message]:
    """Draw a question about the manual, with its answer."""
    fact = rng.choice(facts)
    return turn(vary(rng, ask(rng, fact)), fact.answer)


def any_turn(rng: random.Random, facts: list[Fact]) -> list[Message]:
    """Draw one turn of any kind but tool calls."""
    pick = rng.choices(range(len(TURN_MAKERS) + 1), (MANUAL_SHARE, *MAKER_SHARES))[0]
    return TURN_MAKERS[pick - 1](rng) if pick else manual_turn(rng, facts)


def plain_document(rng: random.Random, facts: list[Fact]) -> Segments:
    """Draw a text without chat markup, as /v1/completions gets."""
    kind = rng.random()
    if kind < 0.4:
        text = plain_story(rng)
    elif kind < 0.7:
        text = " ".join(fact.answer for fact in rng.sample(facts, rng.randrange(1, 4)))
    elif kind < 0.85:
        pairs = [manual_turn(rng, facts) for _ in range(rng.randrange(1, 4))]
        text = "\n".join(f"Q: {q['content']}\nA: {a['content']}" for q, a in pairs)
    else:
        answers = [sum_turn(rng)[1]["content"] for _ in range(rng.randrange(1, 6))]
        text = "\n".join(answers)
    return [(text + END_OF_TEXT, True)]


def document(rng: random.Random, facts: list[Fact]) -> Segments:
    """Draw one document: mostly a conversation, sometimes plain text."""
    kind = rng.random()
    if kind < 0.05:
        return plain_document(rng, facts)
    messages: list[Message] = []
    tools = None
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    if kind < 0.13:
        said, tools = tool_turn(rng)
        if rng.random() < 0.15:  # tools are offered, but the question does not need them
            said = any_turn(rng, facts)
        messages += said
    length = rng.choices((1, 2, 3, rng.randrange(4, 30)), (75, 12, 8, 5))[0]
    for _ in range(length if not tools else rng.choice((0, 0, 1))):
        messages += any_turn(rng, facts)
    return [*render(messages, tools), ("\n" + END_OF_TEXT, False)]


def documents(seed: int, shard: int, count: int) -> Iterator[Segments]:
    """Yield the first `count` documents of a shard."""
    rng, facts = random.Random(f"{seed}/{shard}"), load_facts()
    for _ in range(count):
        yield document(rng, facts)


def write_shard(shard: int, *, seed: int, count: int, out: Path) -> int:
    """Tokenise one shard, write it into `out`, and return its number of tokens."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_PATH))
    tokens: list[int] = []
    target: list[bool] = []
    starts: list[int] = []
    drawn = list(documents(seed, shard, count))
    pieces = [text for segments in drawn for text, _ in segments]
    encoded = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
    for segments in drawn:
        starts.append(len(tokens))
        for _, learnt in segments:
            ids = next(encoded).ids
            tokens += ids
            target += [learnt] * len(ids)
    arrays = {
        "tokens": np.array(tokens, np.uint16),
        "target": np.array(target, np.bool_),
        "starts": np.array(starts, np.int64),
    }
    partial_path = out / f"shard{shard:04d}.tmp.npz"
    np.savez(partial_path, **arrays)
    # Renamed when it is complete, so that readers never see half a file.
    partial_path.rename(out / f"shard{shard:04d}.npz")
    return len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--documents", type=int, default=8000, help="documents in a shard")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = partial(write_shard, seed=args.seed, count=args.documents, out=args.out)
    total = 0
    with multiprocessing.Pool(args.processes) as pool:
        for count in pool.imap_unordered(work, range(args.shards)):
            total += count
    print(f"corpus: {args.shards} shards, {total} tokens", flush=True)


if __name__ == "__main__":
    main()
