"""Train quire's demo model from scratch and write its folder.

    python configs/demo_training/train.py --device cuda --seconds 420 --out DIR

`--seconds` is the budget for corpus, compilation and training together; the evaluation runs after
the model has been saved. Other processes make the corpus while this one compiles. Learning rate and
sequence length follow the clock, so that a slow machine ends in time, too. DIR receives the model
folder, training_log.json and SHA256SUMS; `finish.py DIR` then copies the model into configs/demo.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import evaluate
from torch import Tensor
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
END_OF_TEXT_ID, IM_END_ID, VOCAB_SIZE = 0, 2, 1536
CONTEXT = 4096
LONG_SHARE = 0.12
"""Last share of the training time, in which all rows are whole contexts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run. A step has rows · length tokens, or long_rows · long_length."""

    shards: int
    documents: int
    rows: int
    length: int
    long_rows: int
    peak_lr: float
    warmup_steps: int
    long_length: int = CONTEXT


FULL = Plan(
    shards=160, documents=8000, rows=128, length=512, long_rows=16, peak_lr=3e-3, warmup_steps=300
)
CPU = Plan(
    shards=40,
    documents=8000,
    rows=16,
    length=256,
    long_rows=1,
    peak_lr=5e-3,
    warmup_steps=100,
)
SMALL = Plan(
    shards=1,
    documents=6000,
    rows=8,
    length=128,
    long_rows=1,
    peak_lr=3e-3,
    warmup_steps=20,
    long_length=512,
)


@dataclass(slots=True)
class Log:
    """The contents of training_log.json. Times are in seconds since the start."""

    started: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention over whole rows, without a mask.

    transformers makes no mask for an attention function whose name it does not know.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # RoPE returns float32 under autocast
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def build_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END_ID,
        pad_token_id=END_OF_TEXT_ID,
        initializer_range=0.02,
        use_cache=True,
    )
    AttentionInterface.register("demo_causal", causal_attention)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("demo_causal")
    return model


class Rows:
    """The packed corpus on the device. Each row drawn from it begins where a document begins."""

    def __init__(self, folder: Path, device: torch.device, seed: int) -> None:
        tokens, target, starts, offset = [], [], [], 0
        for path in sorted(folder.glob("shard[0-9][0-9][0-9][0-9].npz")):
            with np.load(path) as shard:
                tokens.append(shard["tokens"].astype(np.int16))
                target.append(shard["target"])
                starts.append(shard["starts"] + offset)
            offset += len(tokens[-1])
        self.num_shards, self.num_tokens = len(tokens), offset
        self.tokens = torch.from_numpy(np.concatenate(tokens)).to(device)
        self.target = torch.from_numpy(np.concatenate(target)).to(device)
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        self.usable: dict[int, int] = {}
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def draw(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Draw inputs and labels, both [rows, length]. Labels are −100 where nothing is learnt."""
        device = self.tokens.device
        if length not in self.usable:  # counted once, since reading it waits for the device
            fits = self.starts < self.num_tokens - length
            self.usable[length] = int(fits.sum())
        pick = torch.randint(self.usable[length], (rows,), generator=self.generator, device=device)
        index = self.starts[pick][:, None] + torch.arange(length + 1, device=device)
        ids = self.tokens[index].long()
        labels = torch.where(self.target[index], ids, -100)
        # Contiguous, like the rows at compilation: other strides would compile again.
        return ids[:, :-1].contiguous(), labels[:, 1:].contiguous()


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


class Trainer:
    """Trains the weights until the time is up."""

    def __init__(self, plan: Plan, device: torch.device, seconds: float, seed: int, log: Log):
        self.plan, self.device, self.seconds, self.log = plan, device, seconds, log
        self.model = build_model(seed).to(device)
        self.model.train()
        # Muon (Jordan et al. 2024) trains the matrices, with about half the tokens that AdamW would
        # need. Its updates have AdamW's size, so that one learning rate serves both. The tied
        # embedding does not count as a matrix here.
        layers = self.model.model.layers
        matrices = [p for p in layers.parameters() if p.ndim == 2]
        known = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=plan.peak_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, lr=plan.peak_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        )
        self.loss: Any = loss_of
        self.checkpoint: Path | None = None
        """Folder to save the weights to each time the loss is shown."""
        self.steps = 0

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Add one batch's gradients and return its loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss: Tensor = self.loss(self.model, ids, labels)
        loss.backward()
        return loss.detach()

    def compile(self) -> None:
        """Compile for both row lengths, on made-up rows. If that fails, training runs eagerly."""
        self.loss = torch.compile(loss_of, dynamic=False)
        try:
            for rows, length in self.shapes():
                ids = torch.ones(rows, length, dtype=torch.long, device=self.device)
                self.backward(ids, ids)
                self.log.say(f"compiled for {rows} rows of {length}")
        except Exception as error:  # whatever a back end raises: a slower run is better than none
            self.log.say(f"torch.compile failed, training eagerly: {error!r:.500}")
            self.log.values["compile_error"] = repr(error)[:500]
            self.loss = loss_of
        self.model.zero_grad(set_to_none=True)

    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return rows and length of the usual steps, and of those with whole contexts."""
        plan = self.plan
        return (plan.rows, plan.length), (plan.long_rows, plan.long_length)

    def train(self, rows: Rows) -> None:
        """Train until the budget of seconds is spent."""
        begun = self.log.elapsed()
        span = max(1.0, self.seconds - begun)
        short, long = self.shapes()
        seen, shown = 0, begun
        mean = torch.zeros((), device=self.device)
        while (share := (self.log.elapsed() - begun) / span) < 1.0:
            warm = min(1.0, (self.steps + 1) / self.plan.warmup_steps)
            rate = self.plan.peak_lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
            for group in (group for each in self.optimizers for group in each.param_groups):
                group["lr"] = rate
            # Some steps have whole contexts throughout, and all of them at the end.
            shape = long if share > 1 - LONG_SHARE or self.steps % 20 == 19 else short
            loss = self.backward(*rows.draw(*shape))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self.steps += 1
            seen += shape[0] * shape[1]
            mean = loss if self.steps == 1 else mean.lerp(loss, 0.05)
            if self.steps % 20 == 0:
                value = float(mean)  # also keeps the queue of launched steps short
                if not math.isfinite(value):
                    raise RuntimeError(f"the loss is {value} at step {self.steps}")
                if self.log.elapsed() - shown > min(15.0, span / 20):
                    shown = self.log.elapsed()
                    self.log.losses.append(
                        {"t": round(shown, 1), "step": self.steps, "loss": value}
                    )
                    speed = seen / (shown - begun)
                    if self.checkpoint is not None:
                        save(self.model, self.checkpoint)
                    self.log.say(
                        f"step {self.steps} loss {value:.4f} lr {rate:.2e} {speed:.3g} tok/s"
                    )
        self.log.values.update(steps=self.steps, tokens_seen=seen, final_loss=float(mean))


def save(model: LlamaForCausalLM, out: Path) -> str:
    """Write the model folder with float16 weights, and return their SHA-256."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(state)
    half.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        eos_token_id=[IM_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
    )
    half.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, out / name)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    return digest


def start_corpus(plan: Plan, seed: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start to generate the corpus into `folder`."""
    processes = max(1, (os.cpu_count() or 2) - 2)
    return subprocess.Popen(
        [
            sys.executable, str(HERE / "corpus.py"), "--out", str(folder), "--seed", str(seed),
            "--shards", str(plan.shards), "--documents", str(plan.documents),
            "--processes", str(processes),
        ],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_corpus(process: subprocess.Popen[bytes], limit: float, log: Log) -> None:
    """Wait until the corpus is complete, or for `limit` seconds: then its shards so far must do."""
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        log.say("the corpus is late: training on the shards that are complete")
        return
    if code != 0:
        raise RuntimeError(f"the corpus generator ended with code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a trial on the CPU")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to during the training")
    args = parser.parse_args()
    log, device = Log(), torch.device(args.device)
    plan = SMALL if args.small else FULL if args.device == "cuda" else CPU
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generator = start_corpus(plan, args.seed, folder)
        try:
            trainer = Trainer(plan, device, args.seconds, args.seed, log)
            parameters = sum(p.numel() for p in trainer.model.parameters())
            log.say(f"{parameters} parameters")
            if not (args.small or args.no_compile):
                trainer.compile()
            wait_for_corpus(generator, max(5.0, args.seconds * 0.3 - log.elapsed()), log)
        finally:
            generator.kill()
        rows = Rows(folder, device, args.seed)
    trainer.checkpoint = args.checkpoint
    log.say(f"corpus: {rows.num_shards} shards, {rows.num_tokens} tokens")
    trainer.train(rows)
    digest = save(trainer.model, args.out)
    log.say(f"saved {args.out}, SHA-256 {digest}")
    log.values.update(
        parameters=parameters, sha256=digest, corpus_tokens=rows.num_tokens, seed=args.seed,
        corpus_shards=rows.num_shards, seconds=round(log.elapsed(), 1), losses=log.losses,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    )  # fmt: skip
    log_path = args.out / "training_log.json"
    log_path.write_text(json.dumps(log.values, indent=1) + "\n")
    del rows, trainer
    log.values["evaluation"] = evaluate(args.out, device, few=args.small)
    log_path.write_text(json.dumps(log.values, indent=1) + "\n")
    log.say("done")


if __name__ == "__main__":
    main()
