"""Draws one token for every row of a batch, on the device, without waiting for it.

Per row, in this order: the model's log-probabilities are read; masks (structured output,
allowed tokens, min_tokens, bad words), logit bias, repetition, frequency and presence penalties;
then the argmax, or temperature, top_k, top_p, min_p and a draw.

A draw is an exponential race: the token with the largest p_i / E_i, E_i ~ Exp(1), wins with
probability p_i / Σp (the Gumbel-max trick without the logarithm); the E are a hash of seed,
position and token id (counter_rng.py). The race needs no normaliser, maxima and comparisons are
exact, and the masses that top_p sums are integers: no result depends on the order of a
reduction, hence on the batch's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TokenLogprobs
from ..step import SequenceSpec
from .batch import SamplingBatch, SamplingBatchBuilder
from .counter_rng import exponential, stream_keys
from .logprobs import LogprobTensors, compute_logprobs, to_token_logprobs
from .plan import DrawGroup, PenaltyRows
from .top_tokens import top_tokens

_MASS_UNIT = 2.0**40
"""Integer mass of the likeliest token; a vocabulary's sum stays below 2^63 up to 2^23 tokens."""
_DRAW_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Logits drawn from at a time: what stays in a CPU's cache, what bounds a GPU's memory."""


class SamplerOutput(NamedTuple):
    """Device tensors, parallel to the batch's rows; the runner copies them to the host.

    Where `finite[i]` is False the row has no valid token: its logits hold NaN or +inf, or
    nothing finite is left once the row's masks are applied.
    """

    token_ids: Tensor  # [R] int64, always in the vocabulary
    finite: Tensor  # [R] bool
    logprobs: LogprobTensors | None  # of the rows `SamplingPlan.logprob_rows`


def collect_logprobs(output: SamplerOutput, batch: SamplingBatch) -> dict[int, TokenLogprobs]:
    """Log-probabilities by row, from an `output` that is on the host; without failed rows."""
    if output.logprobs is None:
        return {}
    finite = output.finite.tolist()
    entries = to_token_logprobs(output.logprobs, batch.plan.num_top)
    pairs = zip(batch.plan.logprob_rows, entries, strict=True)
    return {row: entry for row, entry in pairs if finite[row]}


class Sampler:
    """One for a runner: `prepare` the step's rows, call with their logits, `forget` leavers."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._builder = SamplingBatchBuilder(vocab_size, device)
        self._token_ids = torch.arange(vocab_size, device=device)
        bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
        self._bias_of_byte = torch.where(bits & 1 == 1, 0.0, -torch.inf)
        """[256, 8]: what eight bits of a token bitmask add to their tokens' logits."""

    def prepare(
        self,
        sequences: Sequence[SequenceSpec],
        positions: Sequence[int] | None = None,
        constrained_rows: Sequence[int] = (),
        banned: Mapping[int, Sequence[int]] = MappingProxyType({}),
        last_token_ids: Tensor | None = None,
    ) -> SamplingBatch:
        """See `SamplingBatchBuilder.build`; nearly free while the same sequences sample."""
        return self._builder.build(sequences, positions, constrained_rows, banned, last_token_ids)

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that finished or were preempted."""
        self._builder.forget(seq_ids)

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, batch: SamplingBatch, token_bitmask: Tensor | None = None
    ) -> SamplerOutput:
        """Sample from `logits` [R, V] of any float type, which are left as they are.

        `token_bitmask` [C, ceil(V / 32)] int32 of the batch's constrained rows, in order: bit
        i % 32 of word i // 32 allows token i.
        """
        plan = batch.plan
        if logits.shape != (plan.num_rows, len(self._token_ids)):
            raise ValueError(
                f"logits are {tuple(logits.shape)}, not {(plan.num_rows, len(self._token_ids))}"
            )
        if (token_bitmask is None) != (plan.constrained is None):
            raise ValueError("a token bitmask and constrained rows need one another")
        # The maximum is NaN where a row holds one, +inf likewise, -inf if there is nothing else.
        best, token_ids = _best(logits)
        finite = best.isfinite()
        if plan.working_rows is not None:
            rows = plan.working_rows
            every_row = len(rows) == plan.num_rows
            x = logits if every_row else logits.index_select(0, rows)
            best = best if every_row else best.index_select(0, rows)
            if plan.shaped:
                x = self._shape(x, batch, token_bitmask)
                best, shaped_ids = _best(x)
                token_ids.index_copy_(0, rows, shaped_ids)
                finite = finite.index_copy(0, rows, best.isfinite()) & finite
            for group in plan.groups:
                token_ids.index_copy_(0, group.batch_rows, self._draw(x, best, group, batch))
        return SamplerOutput(token_ids, finite, self._logprobs(logits, token_ids, batch))

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, batch: SamplingBatch
    ) -> LogprobTensors | None:
        plan = batch.plan
        if not plan.logprob_rows:
            return None
        if plan.logprob_index is not None:
            logits = logits.index_select(0, plan.logprob_index)
            token_ids = token_ids.index_select(0, plan.logprob_index)
        return compute_logprobs(logits, token_ids, max(plan.num_top))

    def _shape(self, logits: Tensor, batch: SamplingBatch, token_bitmask: Tensor | None) -> Tensor:
        """A float32 copy of the working rows [W, V] with masks, bias and penalties applied."""
        plan = batch.plan
        num_rows, vocab_size = logits.shape
        # One element more than W * V: where padding is written, so that it needs no branch.
        flat = torch.empty(num_rows * vocab_size + 1, dtype=torch.float32, device=logits.device)
        flat[-1] = 0.0
        x = flat[:-1].view(num_rows, vocab_size)
        x.copy_(logits)
        if plan.constrained is not None and token_bitmask is not None:
            bias = self._bias(token_bitmask)[:, :vocab_size]
            if len(bias) == num_rows:
                x.add_(bias)
            else:
                x.index_add_(0, plan.constrained, bias)
        if plan.masks is not None:
            _forbid(x, plan.masks.working_rows, plan.masks.forbidden)
        if batch.suppressed is not None:
            flat.index_fill_(0, batch.suppressed, -torch.inf)
        if plan.bias is not None:
            flat.scatter_add_(0, plan.bias.indices, plan.bias.values)
        if plan.penalties is not None:
            _penalise(flat, vocab_size, plan.penalties, batch)
        return x

    def _bias(self, bitmask: Tensor) -> Tensor:
        """Of an int32 bitmask [C, W]: 0 or -inf for each of its tokens, [C, 32 W] float32.

        A lookup for each byte: on a CPU several times faster than shifting, and adding is faster
        than filling where a mask says, which branches at each token.
        """
        octets = bitmask.contiguous().view(torch.uint8).flatten().to(torch.int32)
        return self._bias_of_byte.index_select(0, octets).view(len(bitmask), -1)

    def _draw(self, x: Tensor, best: Tensor, group: DrawGroup, batch: SamplingBatch) -> Tensor:
        """Token ids [G] of a group, from the working logits [W, V] and their maxima [W]."""
        assert batch.positions is not None
        if x.device.type == "cpu" and not group.is_filtered:
            return self._draw_on_cpu(x, best, group, batch.positions)
        positions = batch.positions.index_select(0, group.batch_rows)
        if _has_kernel(x.device):
            from ...kernels.cuda.sample_tokens import sample_tokens

            return sample_tokens(
                x,
                best,
                rows=group.working_rows,
                seeds=group.seeds,
                positions=positions,
                temperature=group.temperature,
                top_k=group.top_k,
                top_p=group.top_p,
                log_min_p=group.log_min_p,
            )
        keys = stream_keys(group.seeds, positions)
        rows = max(1, _DRAW_ELEMENTS[x.device.type] // x.shape[1])
        draw = self._draw_candidates if group.num_candidates else self._draw_vocabulary
        pieces = []
        for start in range(0, len(keys), rows):
            piece = group.slice(start, start + rows)
            logits = x.index_select(0, piece.working_rows).to(torch.float32)
            top = best.index_select(0, piece.working_rows).to(torch.float32).unsqueeze(1)
            pieces.append(draw(logits, top, keys[start : start + rows], piece))
        return torch.cat(pieces)

    def _draw_on_cpu(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        """`_draw` from all tokens, see `cpu_sampling.draw`; positions [R] of the batch's rows."""
        from ...kernels.cpu.sampling import draw

        winners = torch.empty(len(group.seeds), dtype=torch.int64)
        draw(
            x.to(torch.float32).numpy(),
            group.working_rows.numpy(),
            best.to(torch.float32).numpy(),
            group.temperature.numpy(),
            group.seeds.numpy(),
            positions.numpy(),
            group.batch_rows.numpy(),
            self._token_ids[None].numpy(),
            winners.numpy(),
        )
        return winners

    def _draw_vocabulary(self, x: Tensor, top: Tensor, keys: Tensor, group: DrawGroup) -> Tensor:
        """Draw from all tokens of `x` [G, V] (overwritten), whose maxima are `top` [G, 1]."""
        relative = x.sub_(top).div_(group.temperature)
        if group.top_k is not None or group.top_p is not None:
            _filter(relative, group.top_k, group.top_p)
        if group.log_min_p is not None:
            relative.masked_fill_(relative < group.log_min_p, -torch.inf)
        return _race(relative, keys, self._token_ids)

    def _draw_candidates(self, x: Tensor, top: Tensor, keys: Tensor, group: DrawGroup) -> Tensor:
        """Draw from the top_k best of `x` [G, V]; of equal logits the lower id is better."""
        assert group.top_k is not None
        values, token_ids = top_tokens(x, group.num_candidates, group.top_k)
        relative = values.sub_(top).div_(group.temperature)
        dropped = self._token_ids[: group.num_candidates] >= group.top_k
        if group.top_p is not None:
            mass = _masses(relative).masked_fill_(dropped, 0)
            likelier = mass.cumsum(dim=1) - mass
            dropped |= likelier >= _target_mass(mass, group.top_p)
        if group.log_min_p is not None:
            dropped |= relative < group.log_min_p
        winner = _race(relative.masked_fill_(dropped, -torch.inf), keys, token_ids)
        return token_ids.gather(1, winner.unsqueeze(1)).squeeze(1)


def _has_kernel(device: torch.device) -> bool:
    """Whether kernels/cuda/sample_tokens.py draws: the same tokens in one launch or two."""
    return device.type == "cuda"


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima [R] of rows [R, V] and the first ids [R] that have them; NaN is a row's maximum."""
    if x.device.type != "cpu":
        return x.max(dim=1)
    # NumPy's argmax is vectorised, torch's on the CPU is not: 15 times at 32,000 tokens.
    token_ids = torch.from_numpy(x.to(torch.float32).numpy().argmax(axis=1))
    return x.gather(1, token_ids.unsqueeze(1)).squeeze(1), token_ids


def _race(relative: Tensor, keys: Tensor, token_ids: Tensor) -> Tensor:
    """Winners [R]: argmax over N of exp(relative [R, N]) / Exp(1); token ids [N] or [R, N]."""
    if relative.device.type != "cpu":
        return relative.exp().div_(exponential(keys, token_ids)).argmax(dim=1)
    from ...kernels.cpu.sampling import race

    winners = torch.empty(len(relative), dtype=torch.int64)
    ids = token_ids.view(-1, relative.shape[1])
    race(relative.numpy(), keys.numpy(), ids.numpy(), winners.numpy())
    return winners


def _masses(relative: Tensor) -> Tensor:
    """exp(relative ≤ 0) in fixed point, int64: sums are exact in any order."""
    return (relative.exp() * _MASS_UNIT).to(torch.int64)


def _target_mass(mass: Tensor, top_p: Tensor) -> Tensor:
    """The mass [R, 1] that a nucleus must reach; at least 1, so that it is never empty."""
    return (mass.sum(dim=1, keepdim=True) * top_p).ceil_().to(torch.int64).clamp_(min=1)


def _filter(relative: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> None:
    """Set what top_k, then top_p drop to -inf, in place; equal logits stay or go together."""
    # The bits of a non-negative float order as it does; clearing the sign makes 0 of -0, too.
    distance = relative.view(torch.int32) & 0x7FFFFFFF
    if top_k is not None:
        ones = torch.ones_like(distance, dtype=torch.int64)
        relative.masked_fill_(distance > _covering_key(distance, ones, top_k), -torch.inf)
    if top_p is not None:
        mass = _masses(relative)
        limit = _covering_key(distance, mass, _target_mass(mass, top_p))
        relative.masked_fill_(distance > limit, -torch.inf)


def _covering_key(keys: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """The least key t [R, 1] such that the mass of all keys ≤ t reaches the target [R, 1].

    `keys` [R, N] int32 ≥ 0, `mass` [R, N] int64 ≥ 0. Where the sum never reaches the target, t is
    the largest int32. A radix select: three histograms, of the first 11 bits of the keys, then of
    the next 10 of those that share the limit's first bits, then of the last 10. It replaces a
    sort of the vocabulary, and integer sums make it exact and independent of their order.
    """
    prefix = torch.zeros_like(target)
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        digits = (keys >> shift).to(torch.int64)
        inside = mass if shift == 20 else mass.masked_fill(digits >> width != prefix, 0)
        size = 1 << width
        histogram = inside.new_zeros((keys.shape[0], size))
        histogram.scatter_add_(1, digits.bitwise_and_(size - 1), inside)
        reached = histogram.cumsum(dim=1)
        digit = (reached < target).sum(dim=1, keepdim=True).clamp_(max=size - 1)
        target = target - (reached.gather(1, digit) - histogram.gather(1, digit))
        prefix = (prefix << width) | digit
    return prefix


def _forbid(x: Tensor, rows: Tensor, forbidden: Tensor) -> None:
    x.index_copy_(0, rows, x.index_select(0, rows).masked_fill_(forbidden, -torch.inf))


def _penalise(flat: Tensor, vocab_size: int, rows: PenaltyRows, batch: SamplingBatch) -> None:
    """Apply the penalties to `flat`, the working logits and one element for padding.

    Repetition (Keskar et al. 2019, as in transformers) covers prompt and output: a positive
    logit is divided by it, a negative one multiplied. Frequency and presence (OpenAI) cover the
    output: minus frequency per occurrence, minus presence once. Occurrences of one token write
    the same value, or subtract the same one: their order does not matter.
    """
    assert batch.positions is not None and batch.history is not None
    sink = len(flat) - 1
    step = torch.arange(batch.history.shape[1], device=flat.device)
    lengths = batch.positions.index_select(0, rows.batch_index).unsqueeze(1)
    indices = rows.working_rows * vocab_size + batch.history
    indices.masked_fill_(step >= lengths, sink)
    values = flat[indices]
    values = torch.where(values > 0, values / rows.repetition, values * rows.repetition)
    flat[indices] = values
    indices.masked_fill_(step < rows.num_prompt_tokens, sink)
    amounts = (-rows.frequency).expand_as(indices)
    flat.scatter_add_(0, indices.flatten(), amounts.flatten())
    flat[indices] = flat[indices] - rows.presence
