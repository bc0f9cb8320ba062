"""Test the slots of token rows: they grow and are reused, and no read goes past a row's length."""

from __future__ import annotations

import random

from quire.engine.sampling.token_history import TokenHistory
from quire.engine.step import SequenceSpec

from ..sampling_rows import CPU, make_sequence


def check(history: TokenHistory, sequences: list[SequenceSpec], lengths: list[int]) -> None:
    slots = history.record(sequences, lengths)
    assert len(set(slots)) == len(slots)
    for sequence, slot, length in zip(sequences, slots, lengths, strict=True):
        assert history.tokens[slot, :length].tolist() == sequence.token_ids[:length]


def test_random_histories_match_their_sequences() -> None:
    generator = random.Random(0)
    history = TokenHistory(CPU)
    alive: list[SequenceSpec] = []
    for _ in range(300):
        if generator.random() < 0.4:
            prompt = [generator.randrange(1000) for _ in range(generator.choice([1, 50, 700]))]
            alive.append(make_sequence(prompt=prompt))
        if alive and generator.random() < 0.3:
            gone = alive.pop(generator.randrange(len(alive)))
            history.forget([gone.seq_id, gone.seq_id])
        for sequence in alive:
            new = range(generator.choice([0, 1, 1, 3]))
            sequence.token_ids.extend(generator.randrange(1000) for _ in new)
        batch = generator.sample(alive, k=min(len(alive), 20))
        if batch:
            check(history, batch, [len(sequence.token_ids) for sequence in batch])
    assert len(history) <= len(alive)
    history.forget([sequence.seq_id for sequence in alive])
    assert len(history) == 0


def test_slots_are_reused() -> None:
    history = TokenHistory(CPU)
    size = history.tokens.shape
    for _ in range(5):
        sequences = [make_sequence() for _ in range(size[0])]
        check(history, sequences, [3] * len(sequences))
        history.forget([sequence.seq_id for sequence in sequences])
    assert history.tokens.shape == size
