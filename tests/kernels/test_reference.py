"""Compare the references with torch's own operations and with the definitions, in float64."""

import sys
from pathlib import Path

import pytest
import torch

from quire.kernels import reference

sys.path.append(str(Path(__file__).parent))
from paged import paged_inputs  # noqa: E402

F64 = torch.float64


@pytest.mark.parametrize("query_len,length", [(7, 7), (1, 30), (12, 45)])
@pytest.mark.parametrize("window", [None, 1, 9, -1, -10])
def test_attention_equals_that_of_torch(query_len: int, length: int, window: int | None) -> None:
    inputs = paged_inputs(
        [2, query_len], [2, length], num_heads=6, num_kv_heads=2, head_dim=16, block_size=16,
        dtype=F64,
    )  # fmt: skip
    found = reference.paged_attention_extend(
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table,
        inputs.query_start_loc, inputs.seq_lens, scale=0.3, max_query_len=query_len,
        window=window,
    )[2:]  # fmt: skip
    blocks = inputs.block_table[1, : -(-length // 16)]
    keys = reference.gather_blocks(inputs.key_cache, blocks, length)
    values = reference.gather_blocks(inputs.value_cache, blocks, length)
    distance = torch.arange(length - query_len, length)[:, None] - torch.arange(length)
    mask = distance >= 0
    if window is not None and window > 0:
        mask &= distance < window
    elif window is not None:  # query and key are in one chunk of -window tokens
        chunks = torch.arange(length) // -window
        mask &= chunks[length - query_len :, None] == chunks
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs.query[2:].transpose(0, 1), keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(0, 1))


def test_softcap_and_sinks_by_hand() -> None:
    """Every number of one query and two keys is written out."""
    keys = torch.zeros(1, 1, 16, 16, dtype=F64)
    values = torch.zeros_like(keys)
    keys[0, 0, 0, 0], keys[0, 0, 1, 0] = 4.0, -2.0
    values[0, 0, 0, 0], values[0, 0, 1, 1] = 1.0, 1.0
    query = torch.zeros(1, 1, 16, dtype=F64)
    query[0, 0, 0] = 3.0
    found = reference.paged_attention_decode(
        query, keys, values, torch.tensor([[0]]), torch.tensor([2]), scale=0.5, softcap=2.0,
        sinks=torch.tensor([0.7]),
    )  # fmt: skip
    scores = 2.0 * torch.tanh(torch.tensor([6.0, -3.0], dtype=F64) / 2.0)
    total = scores.exp().sum() + torch.tensor(0.7, dtype=torch.float32).double().exp()
    torch.testing.assert_close(found[0, 0, :2], scores.exp() / total)


def test_padding_rows_of_a_decode_batch_are_zero() -> None:
    inputs = paged_inputs(
        [1, 1], [0, 5], num_heads=2, num_kv_heads=1, head_dim=16, block_size=16, dtype=F64
    )
    found = reference.paged_attention_decode(
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.seq_lens,
        scale=1.0, sinks=torch.zeros(2),
    )  # fmt: skip
    assert not found[0].any() and found[1].any() and not found.isnan().any()


def test_write_then_gather_gives_the_tokens_back() -> None:
    key, value = torch.randn(2, 20, 3, 16)
    caches = torch.full((2, 4, 3, 16, 16), float("nan"))
    blocks = torch.tensor([2, 0])
    slots = (blocks[:, None] * 16 + torch.arange(16)).flatten()[:20]
    reference.reshape_and_cache(key, value, *caches, slots)
    assert torch.equal(reference.gather_blocks(caches[0], blocks, 20), key.transpose(0, 1))
    assert torch.equal(reference.gather_blocks(caches[1], blocks, 20), value.transpose(0, 1))
    before = caches.clone()
    reference.reshape_and_cache(key, value, *caches, torch.full((20,), -1))
    torch.testing.assert_close(caches, before, equal_nan=True)


def test_norms_and_activation_equal_those_of_torch() -> None:
    x, weight = torch.randn(5, 32, dtype=F64), torch.randn(32, dtype=F64)
    expected = torch.nn.functional.rms_norm(x, (32,), weight, eps=1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, eps=1e-5), expected)
    plus_one = reference.rms_norm(x, weight - 1, eps=1e-5, plus_one=True)
    torch.testing.assert_close(plus_one, expected)
    residual, update = torch.randn_like(x), x.clone()
    total = residual + x
    reference.fused_add_rms_norm(update, residual, weight, eps=1e-5)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(update, reference.rms_norm(total, weight, eps=1e-5))
    gate, up = x[:, :16], x[:, 16:]
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(reference.silu_and_mul(x), expected)


def test_rope_equals_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = torch.randn(7, 4, 32, dtype=F64), torch.randn(7, 2, 32, dtype=F64)
    angles = torch.randn(7, 16, dtype=F64).repeat(1, 2)
    caches = torch.zeros(2, 1, 2, 16, 32, dtype=F64)
    slots = torch.arange(7)
    found = reference.rope_and_cache(query, key, key, *caches, slots, angles.cos(), angles.sin())
    wanted = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin(), unsqueeze_dim=1)
    torch.testing.assert_close(found, wanted[0])
    torch.testing.assert_close(caches[0, 0, :, :7].transpose(0, 1), wanted[1])
