"""Drafts from the text that the client expects (OpenAI's Predicted Outputs)."""

from __future__ import annotations

from ..sequence import Sequence

MATCHED = 3
"""Last tokens by which the place in the prediction is found again after the output left it."""


class PredictionDrafter:
    """Follows the output along its request's prediction.

    The output may leave the prediction and come back to it: from the place where it left, the next
    occurrence of its last tokens is looked for.
    """

    name = "prediction"
    prior = 0.8

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        """seq_id → (output tokens that were read, place in the prediction after them)."""

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        predicted = sequence.request.prediction
        if not predicted:
            return []
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        read, place = self._places.get(sequence.seq_id, (0, 0))
        for index in range(read, len(output)):
            if place < len(predicted) and predicted[place] == output[index]:
                place += 1
                continue
            tail = tuple(output[max(0, index + 1 - MATCHED) : index + 1])
            place = _find(predicted, tail, place)
        self._places[sequence.seq_id] = (len(output), place)
        return list(predicted[place : place + k])

    def forget(self, seq_id: int) -> None:
        self._places.pop(seq_id, None)


def _find(predicted: tuple[int, ...], tail: tuple[int, ...], start: int) -> int:
    """Return the place after the first occurrence of `tail` that ends after `start`, or `start` if
    there is none."""
    if len(tail) < MATCHED:
        return start
    for end in range(start + 1, len(predicted) + 1):
        if predicted[max(0, end - len(tail)) : end] == tail:
            return end
    return start
