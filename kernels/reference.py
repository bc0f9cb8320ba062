"""Plain-torch references for the kernels: the same signatures, nothing clever, on any device.

Half-precision inputs are computed in float32 and rounded once at the end. Float64 inputs stay
float64, which gives the tests an oracle that is more accurate than what they check. Sources:
scaled dot-product attention (arXiv 1706.03762) with a sliding window (Mistral, arXiv 2310.06825),
logit soft-capping (Gemma 2, arXiv 2408.00118) and attention sinks as learnt logits (gpt-oss, arXiv
2508.10925); RMSNorm (arXiv 1910.07467); rotary embedding (arXiv 2104.09864); SwiGLU (arXiv
2002.05202); float8 e4m3 (arXiv 2209.05433).
"""

import torch
from torch import Tensor

from .reference_experts import run_experts as run_experts
from .reference_inputs import prepare_inputs as prepare_inputs

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
"""The largest finite e4m3 number."""


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in the dtype that results are computed in: float64 as it is, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _bits(cache: torch.Tensor) -> torch.Tensor:
    """Return a float8 cache as bytes, which torch can index on every device; any other as it is."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def _stored(x: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Convert `x` to what `_bits(cache)` stores; float8 is divided by its scale and saturates."""
    if cache.dtype != E4M3:
        return x.to(cache.dtype)
    x = x.float() if scale is None else x.float() / scale[:, None]
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
    value_width: int | None = None,
) -> None:
    """Write K and V `[num_tokens, num_kv_heads, head_dim]` to their slots of one layer's caches.

    `slot_mapping` `[num_tokens]` int64 holds block_id * block_size + offset; rows with a negative
    slot are padding and are skipped. A float8_e4m3fn cache stores K / kv_scales[0] and
    V / kv_scales[1] (`[2, num_kv_heads]` float32, default 1), saturated at ±448. Latents are keys
    alone, without value and value_cache; value_width is unused.
    """
    block_size = key_cache.shape[2]
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    blocks, offsets = slots // block_size, slots % block_size
    scales = (None, None) if kv_scales is None else kv_scales
    for x, cache, scale in zip((key, value), (key_cache, value_cache), scales, strict=True):
        if x is None or cache is None:
            continue
        _bits(cache)[blocks, :, offsets] = _stored(x[real], cache, scale)


def gather_blocks(cache: torch.Tensor, block_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return a sequence's first `length` tokens of one layer's K or V.

    The result is `[num_kv_heads, length, head_dim]`.
    """
    blocks = _bits(cache)[block_ids.long()].view(cache.dtype)
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def paged_attention_extend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    first_seq: torch.Tensor | None = None,
    max_seqs: int | None = None,
    value_width: int | None = None,
) -> torch.Tensor:  # over 50 lines: half are its parameters and what they mean
    """Compute causal attention of packed queries over their sequences' cached blocks.

        out = softmax(scale · Q·Kᵀ, masked) · V

    query `[num_tokens, num_heads, head_dim]` holds sequence s in rows
    query_start_loc[s]:query_start_loc[s + 1]. Its token i is at position seq_lens[s] - query_len[s]
    + i and sees key j iff j <= position and, with a window, position - j < window; a window of -c
    is a chunk: j >= position // c * c (Llama 4). softcap c replaces a score x by c·tanh(x / c).
    sinks `[num_heads]` add one logit per head to the denominator of the softmax only. Rows of `out`
    before query_start_loc[0] and from query_start_loc[-1] on are left as they are. With a
    float8_e4m3fn cache, K and V are the cache times kv_scales (`[2, num_kv_heads]` float32, default
    1). first_seq `[1]` leaves the sequences before it out; max_seqs is unused here. Without
    a value_cache the values are the first value_width numbers of the keys, and `out` has as many.
    """
    if out is None:
        out = query.new_empty(*query.shape[:2], value_width or query.shape[2])
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    first = 0 if first_seq is None else int(first_seq)
    for index, length in enumerate(lengths[first:], first):
        rows = slice(starts[index], starts[index + 1])
        block_ids = block_table[index, : (length + block_size - 1) // block_size]
        queries = _wide(query[rows]).reshape(-1, num_kv_heads, group, query.shape[2])
        keys, values = (
            _wide(gather_blocks(cache, block_ids, length)).to(queries.dtype)
            for cache in (key_cache, key_cache if value_cache is None else value_cache)
        )
        if value_cache is None:
            values = values[..., :value_width]
        if kv_scales is not None:
            keys, values = keys * kv_scales[0, :, None, None], values * kv_scales[1, :, None, None]
        scores = torch.einsum("qkgd,knd->kgqn", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        num_queries = queries.shape[0]
        query_positions = torch.arange(length - num_queries, length, device=query.device)[:, None]
        key_positions = torch.arange(length, device=query.device)[None]
        visible = key_positions <= query_positions
        if window is not None and window > 0:
            visible &= query_positions - key_positions < window
        elif window is not None:
            visible &= key_positions >= query_positions // -window * -window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            column = sinks.to(scores).view(num_kv_heads, group, 1, 1).expand(-1, -1, num_queries, 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length]
        weights = weights.masked_fill(~visible, 0.0)  # not NaN for a row that sees no key
        attended = torch.einsum("kgqn,knd->qkgd", weights, values)
        out[rows] = attended.flatten(1, 2).to(out.dtype)
    return out


def paged_attention_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    workspace: object = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    cascade: object = None,
    value_width: int | None = None,
) -> torch.Tensor:
    """Compute `paged_attention_extend` for an equal number of query tokens in each sequence.

    query is `[num_seqs * query_len, num_heads, head_dim]`, with a query_len that is usually 1;
    seq_lens include the query tokens. A sequence of length 0 is padding and gets zeros. The kernel
    needs `workspace` and `cascade`; they are unused here.
    """
    num_seqs = seq_lens.shape[0]
    query_len = query.shape[0] // max(num_seqs, 1)
    query_start_loc = torch.arange(num_seqs + 1, device=query.device) * query_len
    return paged_attention_extend(
        query,
        key_cache,
        value_cache,
        block_table,
        query_start_loc,
        seq_lens,
        scale=scale,
        max_query_len=query_len,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out=out,
        kv_scales=kv_scales,
        value_width=value_width,
    )


def copy_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copy whole blocks, all parts of them, in all layers.

    kv_cache is `[num_layers, parts, num_blocks, num_kv_heads, block_size, head_dim]`, sources and
    destinations are `[n]` int64 block ids. A destination must be neither a source nor repeated.
    """
    bits = _bits(kv_cache)
    bits[:, :, destinations] = bits[:, :, sources]


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    plus_one: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute x / sqrt(mean(x²) + eps) · weight over the last dimension.

    `plus_one` multiplies by 1 + weight instead, as Gemma does.
    """
    x, scale = _wide(input), _wide(weight)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    result = (normed * (scale + 1 if plus_one else scale)).to(input.dtype)
    return result if out is None else out.copy_(result)


def fused_add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    plus_one: bool = False,
) -> None:
    """In place: residual += input, rounded to its dtype; then input = rms_norm(residual)."""
    residual.copy_(_wide(input) + _wide(residual))
    rms_norm(residual, weight, eps=eps, plus_one=plus_one, out=input)


def silu_and_mul(input: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute silu(gate) · up, with silu(x) = x · sigmoid(x).

    input `[..., 2 * size]` holds the gate in its first half; the result is `[..., size]`.
    """
    gate, up = _wide(input).chunk(2, dim=-1)
    result = (gate * torch.sigmoid(gate) * up).to(input.dtype)
    return result if out is None else out.copy_(result)


def grouped_product(
    input: torch.Tensor,
    quants: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute x Wᵀ + bias with W = scale · q + minimum by group; x is `[num_rows, K]`.

    `quants` holds q as int8 or float8_e4m3fn `[N, K]`, or as uint8 `[N, K / 2]` with the even
    columns in the low halves; scale and minimum are `[N, K / group size]`.
    """
    if quants.dtype == torch.uint8:
        quants = torch.stack((quants & 15, quants >> 4), dim=-1).flatten(1)
    wide = _wide(input)
    groups = quants.to(wide.dtype).view(*scale.shape, -1) * scale[..., None]
    if minimum is not None:
        groups = groups + minimum[..., None]
    result = wide @ groups.flatten(1).T.to(wide.dtype)
    return (result if bias is None else result + bias).to(input.dtype)


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    rotary_dim: int | None = None,
    pairs: bool = False,
    out: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, write K and V to their slots, and return the rotated queries.

    Each head is first normalised (RMSNorm over head_dim) if its weight is given. query is
    `[num_tokens, num_heads, head_dim]`, key and value are `[num_tokens, num_kv_heads, head_dim]`.
    cos and sin are `[num_tokens, rotary_dim]` in Hugging Face's half-rotation layout, whose second
    half equals the first, or only their first halves if `rotary_dim` is given; with `pairs`, the
    elements 2i and 2i + 1 rotate. `slot_mapping` and kv_scales are those of `reshape_and_cache`.
    """
    if rotary_dim is not None and cos.shape[-1] < rotary_dim:
        cos, sin = (torch.cat([half, half], dim=-1) for half in (cos, sin))
    rotary_dim = cos.shape[-1]

    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = _wide(x)
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * _wide(weight)
        turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
        if pairs:
            turned = torch.cat([turned[..., ::2], turned[..., 1::2]], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
        turned = turned * _wide(cos)[:, None] + half * _wide(sin)[:, None]
        if pairs:
            turned = torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)
        return torch.cat([turned, passed], dim=-1)

    rotated = rotate(query, query_weight).to(query.dtype)
    reshape_and_cache(
        rotate(key, key_weight), value, key_cache, value_cache, slot_mapping, kv_scales=kv_scales
    )
    return rotated if out is None else out.copy_(rotated)


def best_tokens(logits: Tensor, best: Tensor, token_ids: Tensor, finite: Tensor) -> None:
    """Write the maxima of the rows `[R, V]`, the first ids that have them, and whether the rows are
    finite: see `kernels/cuda/sampling/best_tokens.py`."""
    values, ids = logits.masked_fill(logits.isnan(), torch.inf).max(dim=1)
    best.copy_(values)
    token_ids.copy_(ids)
    finite.copy_(values.isfinite())


def quantize_rows(input: Tensor, out: Tensor, scale: Tensor) -> None:
    """Round each row to float8 by a scale of its own: see `kernels/cuda/fp8.py`."""
    rows = input.float()
    scale.copy_(rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / E4M3_MAX)
    out.copy_((rows / scale).to(E4M3))


def lora_shrink(x: Tensor, a: Tensor, order: Tensor, loc: Tensor, ranks: Tensor, h: Tensor) -> None:
    """Store A x in `h`, for rows with a LoRA adapter: see `kernels/cuda/lora.py`."""
    for slot, begin, end in _adapter_rows(loc):
        for part, rank in enumerate(ranks[slot].tolist()):
            rows = x[order[begin:end].long()].float()
            h[part, begin:end, :rank] = rows @ a[slot, part, :rank].float().T


def lora_expand(
    h: Tensor, b: Tensor, order: Tensor, loc: Tensor, ranks: Tensor, sizes: tuple[int, ...],
    out: Tensor,
) -> None:  # fmt: skip
    """Add B h to the rows of `out` that have a LoRA adapter: see `kernels/cuda/lora.py`."""
    for slot, begin, end in _adapter_rows(loc):
        rows, left = order[begin:end].long(), 0
        for part, (rank, size) in enumerate(zip(ranks[slot].tolist(), sizes, strict=True)):
            columns = slice(left, left + size)
            delta = h[part, begin:end, :rank] @ b[slot, columns, :rank].float().T
            out[rows, columns] = (out[rows, columns].float() + delta).to(out.dtype)
            left += size


def _adapter_rows(loc: Tensor) -> list[tuple[int, int, int]]:
    """Return each slot, with where its rows begin and end."""
    bounds = loc.tolist()
    return [(slot, bounds[slot], bounds[slot + 1]) for slot in range(len(bounds) - 1)]
