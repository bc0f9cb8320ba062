"""Drafts of a small model with the same vocabulary, which the worker runs beside the served one."""

from __future__ import annotations

from ..sequence import Sequence
from ..step import UNKNOWN_TOKEN


class ModelDrafter:
    """Asks the step's worker for drafts: its own tokens are placeholders.

    The worker fills them in (`Launcher.propose`) once the step is planned and has its slots. Each
    further token of the longest draft costs a pass of the draft model.
    """

    name = "model"
    prior = 0.7

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        return [UNKNOWN_TOKEN] * k

    def forget(self, seq_id: int) -> None:
        """Do nothing: the worker keeps what there is to keep."""
