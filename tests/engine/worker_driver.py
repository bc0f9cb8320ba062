"""Drive a worker without a scheduler: own block tables, chunked prefill in a token budget."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from quire.engine.config import EngineConfig
from quire.engine.devices.backend import Backend
from quire.engine.devices.choose import choose_backend
from quire.engine.grammar.bad_words import banned_tokens
from quire.engine.model.causal_lm import CausalLM
from quire.engine.model.loader import load_model
from quire.engine.outputs import TokenLogprobs
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Rank, Sequence
from quire.engine.step import (
    NO_CONSTRAINTS,
    BlockCopy,
    ModelRunnerOutput,
    SchedulerOutput,
    TableChange,
)

_ids = count()


def make_config(folder: Path, **overrides: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float32",  # K and V too, as in the references
        "num_blocks": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 128,
        "num_threads": 1,
    }
    return EngineConfig(**values | overrides)


def load(folder: Path, **overrides: Any) -> CausalLM:
    """Return the model in `folder` as a worker loads it."""
    config = make_config(folder, **overrides)
    return load_model(config, choose_backend(config))


def make_prompts(lengths: list[int]) -> list[list[int]]:
    """Return random prompts of these lengths, the same ones each time."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


def make_sequence(prompt: list[int], max_tokens: int, **params: Any) -> Sequence:
    request = Request(
        request_id=f"request-{next(_ids)}",
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True} | params, max_tokens=max_tokens
        ),
        arrival_time=time.monotonic(),
    )
    return Sequence(request, 0, 0, Rank(0, next(_ids), 0), frozenset())


class Driver:
    """A driver that runs sequences to their ends, first come first served.

    A step has at most `budget` tokens.
    """

    def __init__(
        self, worker: Worker, config: EngineConfig, num_blocks: int, num_groups: int = 1
    ) -> None:
        self.worker = worker
        self.num_groups = num_groups
        self.budget = config.max_num_batched_tokens
        self.block_size = config.block_size
        # Last blocks first: a block id is never a sequence's block index by accident.
        self.free_blocks = list(range(num_blocks))
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.released: list[int] = []
        self.copies: list[BlockCopy] = []
        self.known: set[int] = set()
        self.rows: list[Sequence] = []
        """The sequences of the last plan's rows."""
        self.steps = 0
        self.mixed_steps = 0

    @classmethod
    def start(cls, config: EngineConfig, backend: Backend | None = None) -> Driver:
        worker = Worker(config, backend)
        num_groups = len(worker.load().group_windows)
        return cls(worker, config, worker.profile(), num_groups)

    def run(self, sequences: list[Sequence]) -> list[list[int]]:
        """Run the sequences to their ends and return the output tokens of each."""
        running = list(sequences)
        while running:
            output, result = self.step(running)
            assert not result.errors
            for row, sequence in enumerate(self.rows):
                if len(sequence.token_ids) == sequence.stop_at:
                    self.release(sequence)
                    running.remove(sequence)
                if row in result.logprobs:
                    self.logprobs.setdefault(sequence.seq_id, []).append(result.logprobs[row])
                entries = result.prompt_logprobs.get(row, [])
                self.prompt_logprobs.setdefault(sequence.seq_id, []).extend(entries)
        return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]

    def step(self, running: list[Sequence]) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        output = self.schedule(running)
        result = self.launch(output)
        for row, sequence in enumerate(self.rows):
            sequence.num_computed_tokens += output.num_new_tokens[row]
            token_id = result.token_ids[row]
            if token_id is not None:
                sequence.token_ids.append(token_id)
        return output, result

    def launch(self, output: SchedulerOutput) -> ModelRunnerOutput:
        banned = {
            row: banned_tokens(words, sequence.token_ids, sequence.num_prompt_tokens)
            for row, sequence in enumerate(self.rows)
            if (words := sequence.request.sampling_params.bad_words)
        }
        constraints = NO_CONSTRAINTS._replace(banned=banned)
        return self.worker.forward(output).sample(constraints)()

    def schedule(self, running: list[Sequence]) -> SchedulerOutput:
        left, rows, new, changes = self.budget, [], [], []
        for sequence in running:
            length = min(left, len(sequence.token_ids) - sequence.num_computed_tokens)
            if length == 0:
                continue
            left -= length
            held = len(sequence.block_table)
            needed = -(-(sequence.num_computed_tokens + length) // self.block_size)
            if not sequence.other_tables:
                sequence.other_tables = [[] for _ in range(self.num_groups - 1)]
            tables = (sequence.block_table, *sequence.other_tables)
            for table in tables:
                for _ in range(needed - len(table)):
                    table.append(self.free_blocks.pop())
            if sequence.seq_id not in self.known:
                new.append(sequence.spec())
            elif needed > held:
                for group, table in enumerate(tables):
                    changes.append(TableChange(sequence.seq_id, held, table[held:], group))
            self.known.add(sequence.seq_id)
            rows.append((sequence, sequence.num_computed_tokens, length))
        lengths = [length for _, _, length in rows]
        self.steps += 1
        self.mixed_steps += min(lengths) == 1 < max(lengths)
        self.rows = [sequence for sequence, _, _ in rows]
        output = SchedulerOutput(
            step=self.steps,
            seq_ids=[sequence.seq_id for sequence in self.rows],
            num_computed_starts=[start for _, start, _ in rows],
            num_new_tokens=lengths,
            token_ids=[
                token
                for sequence, start, length in rows
                for token in sequence.token_ids[start : start + length]
            ],
            partial_rows=[
                row
                for row, (sequence, start, length) in enumerate(rows)
                if start + length < len(sequence.token_ids)
            ],
            new_sequences=new,
            block_copies=self.copies,
            table_changes=changes,
            released=self.released,
            drafts={},
        )
        self.released, self.copies = [], []
        return output

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's blocks and its row, as at its end or a preemption."""
        for table in (sequence.block_table, *sequence.other_tables):
            self.free_blocks.extend(table)
            table.clear()
        sequence.num_computed_tokens = 0
        if sequence.seq_id in self.known:
            self.released.append(sequence.seq_id)
            self.known.remove(sequence.seq_id)
