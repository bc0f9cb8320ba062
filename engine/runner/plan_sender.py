"""Rank 0's plans for the ranks that run the same steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..classifier_spec import ClassifierSpec
from ..devices.steps import HostStep
from ..model.model_spec import ModelSpec
from ..parallel.ranks import Ranks
from ..parallel.step_plan import make_plan
from ..step import SchedulerOutput
from .input_batch import InputBatch
from .pooling import ends_here
from .prompt_logprobs import find_spans

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PlanSender:
    """Sends each step before rank 0 launches it."""

    def __init__(
        self, ranks: Ranks, batch: InputBatch, spec: ModelSpec, *, stays_on_device: bool
    ) -> None:
        """`batch` has to record table entries. `stays_on_device` says that sampled tokens are not
        read here before the next step."""
        self._stays_on_device = stays_on_device
        self._ranks = ranks
        self._batch = batch
        self._vocab_size = spec.vocab_size
        classifier = spec.classifier
        self._scores_by_head = isinstance(classifier, ClassifierSpec) and bool(classifier.token_ids)

    def send(
        self,
        output: SchedulerOutput,
        host: HostStep | None = None,
        token_ids: NDArray[np.int64] | None = None,
    ) -> None:
        """Send a step, which may have no rows, and what the others lack of its tokens."""
        batch = self._batch
        changes, batch.table_entries = batch.table_entries, []
        if host is None and not (changes or output.begins_with_copies):
            return
        if token_ids is None:
            token_ids = np.empty(0, dtype=np.int64)
        unknown = token_ids < 0
        num_fed_back = 0
        if unknown.any():
            if self._stays_on_device:
                num_fed_back = len(batch.sampled)
            else:
                token_ids = token_ids.copy()
                token_ids[unknown] = batch.sampled.numpy()[-1 - token_ids[unknown]]
        plan = make_plan(
            output,
            host,
            token_ids,
            changes,
            extra_logits=[] if host is None else self._extra_logits(host),
            num_fed_back=num_fed_back,
        )
        self._ranks.send(plan)
        if num_fed_back:
            self._ranks.group.broadcast(batch.sampled)

    def _extra_logits(self, host: HostStep) -> list[tuple[int, int]]:
        """Return the ranges of tokens whose logits rank 0 asks for after the forward, in order:
        those of prompts, then those of scores."""
        ranges = []
        if host.any_scored:
            ranges = [(span.begin, span.end) for span in find_spans(host, self._vocab_size)]
        if self._scores_by_head:
            for row in host.pooled_rows:
                if host.sequences[row].pooling == "classify" and ends_here(host, row):
                    last = int(host.query_start_loc[row + 1]) - 1
                    ranges.append((last, last + 1))
        return ranges
