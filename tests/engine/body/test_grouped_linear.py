import torch

from quire.engine.body.grouped_linear import GroupedLinear, GroupedWeight, stack_rows


def _weight(rows: int, bits: int, seed: int, *, with_minimum: bool = True) -> GroupedWeight:
    generator = torch.Generator().manual_seed(seed)
    columns, group_size = 64, 32
    if bits == 4:
        quants = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    else:
        quants = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, columns // group_size, generator=generator)
    minimum = -torch.rand(rows, columns // group_size, generator=generator)
    return GroupedWeight(quants, scale, minimum if with_minimum else None, bits, group_size)


def test_a_dense_weight_is_scale_times_integer_plus_minimum() -> None:
    for bits in (4, 8):
        weight = _weight(3, bits, 0)
        dense = weight.dense()
        assert dense.shape == weight.shape == (3, 64)
        for row, column in ((0, 0), (1, 33), (2, 63)):
            byte = int(weight.quants[row, column // 2 if bits == 4 else column])
            integer = byte >> 4 * (column % 2) & 15 if bits == 4 else byte
            group = column // 32
            assert weight.minimum is not None
            expected = weight.scale[row, group] * integer + weight.minimum[row, group]
            assert torch.isclose(dense[row, column], expected)


def test_stacked_rows_are_the_rows_of_each_weight() -> None:
    for with_minimum in (True, False):
        parts = [_weight(rows, 4, rows, with_minimum=with_minimum) for rows in (2, 5)]
        assert parts[0].is_like(parts[1])
        stacked = stack_rows(parts)
        assert torch.equal(stacked.dense(), torch.cat([part.dense() for part in parts]))
    assert not _weight(2, 4, 0).is_like(_weight(2, 8, 0))
    assert not _weight(2, 4, 0).is_like(_weight(2, 4, 0, with_minimum=False))


def test_a_grouped_layer_multiplies_by_its_dense_weight() -> None:
    bias = torch.arange(3.0)
    layer = GroupedLinear(_weight(3, 8, 1), bias, torch.float32)
    x = torch.randn(2, 4, 64)
    expected = x @ layer.weight.T + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-3)
