"""Plain-torch references of the operations of layers that keep a state, as in `reference.py`.

A step packs rows of new tokens, one sequence after the other. Every row has a slot of `states` that
holds what came of its earlier tokens, and leaves there what comes of these. `saves` names, for some
tokens, another slot that gets the state as it is after that token. Sources: Mamba's short causal
convolution (arXiv 2312.00752), Mamba-2's recurrence (arXiv 2405.21060), and the gated delta rule
(arXiv 2412.06464).
"""

import torch

from .reference import _wide

L2_EPSILON = 1e-6
"""Added to the sum of squares of a key or query before its square root divides it."""


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Return the causal convolution over each sequence of every channel by itself, like x.

        out[t, c] = bias[c] + Σ_j weight[c, j] · x[t − (K − 1) + j, c]

    x is `[T, channels]`, weight `[channels, K]`, bias `[channels]`. A slot of states
    `[num_slots, K − 1, channels]` holds the last K − 1 inputs of its sequence, oldest first. slots
    `[S]` and saves `[T]` are int32 (both may be longer); −1 is none, and a row without a slot
    gets zeros. query_start_loc `[S + 1]` and seq_lens `[S]` int32 are as in attention: a row as
    long as its sequence begins from zeros.
    """
    taps = weight.shape[1] - 1
    out = torch.zeros_like(x)
    for row, (first, last, length) in enumerate(_rows(query_start_loc, seq_lens)):
        slot = int(slots[row])
        if slot < 0 or first == last:
            continue
        before = states[slot].clone()
        if length == last - first:
            before.zero_()
        inputs = torch.cat([_wide(before), _wide(x[first:last])])
        for token in range(first, last):
            at = token - first
            window = inputs[at : at + taps + 1]
            result = (window * _wide(weight).T).sum(dim=0)
            out[token] = (result if bias is None else result + _wide(bias)).to(x.dtype)
            if int(saves[token]) >= 0:
                states[int(saves[token])] = window[1:].to(states.dtype)
        states[slot] = inputs[len(inputs) - taps :].to(states.dtype)
    return out


# Over 50 lines: formulas and layouts that two kernels and their callers rely on.
def gated_recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    normalise: bool,
) -> torch.Tensor:
    """Return what each token reads from its sequence's state, after writing to it; like value.

        S ← e^log_decay_t · S
        S ← S + k_tᵀ v_t                          without beta: Mamba-2, with k = B, q = C
        S ← S + k_tᵀ beta_t (v_t − k_t S)         with beta: the gated delta rule
        out_t = scale · q_t S

    query and key are `[T, key_heads, key_dim]`, value `[T, heads, value_dim]`; heads share a key
    head, as in grouped-query attention. log_decay and beta are `[T, heads]` float32. A slot of
    states `[num_slots, heads, key_dim, value_dim]` is S. With `normalise`, keys and queries are
    divided by their length. slots, saves, query_start_loc and seq_lens are as in `causal_conv`.
    """
    share = value.shape[1] // key.shape[1]
    q, k = (_wide(part).repeat_interleave(share, dim=1) for part in (query, key))
    if normalise:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPSILON) for x in (q, k))
    v, out = _wide(value), torch.zeros_like(value)
    for row, (first, last, length) in enumerate(_rows(query_start_loc, seq_lens)):
        slot = int(slots[row])
        if slot < 0 or first == last:
            continue
        state = _wide(states[slot])
        if length == last - first:
            state = torch.zeros_like(state)
        for token in range(first, last):
            state = state * _wide(log_decay[token, :, None, None]).exp()
            update = v[token]
            if beta is not None:
                known = torch.einsum("hk,hkv->hv", k[token], state)
                update = (update - known) * beta[token, :, None]
            state = state + k[token, :, :, None] * update[:, None]
            out[token] = (torch.einsum("hk,hkv->hv", q[token], state) * scale).to(out.dtype)
            if int(saves[token]) >= 0:
                states[int(saves[token])] = state.to(states.dtype)
        states[slot] = state.to(states.dtype)
    return out


def _rows(loc: torch.Tensor, seq_lens: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return first token, end and sequence length of each row."""
    bounds = loc.tolist()
    return list(zip(bounds[:-1], bounds[1:], seq_lens.tolist(), strict=True))
