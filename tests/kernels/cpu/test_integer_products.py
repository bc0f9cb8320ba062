"""Compare products in integers with exact ones: the integers themselves, each kind of weight, each
way of a processor to multiply bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite import binding, ir
from torch import nn

from quire.engine.body.grouped_linear import GroupedLinear, GroupedWeight
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.engine.devices.cpu.packing import pack_weight, round_to_int4, unpack
from quire.kernels.cpu.integer import dots
from quire.kernels.cpu.integer.products import IntegerWeight
from quire.kernels.cpu.numbers import FEATURES, LANES
from quire.kernels.cpu.products import (
    HEAD_BYTES,
    count_few,
    make_quantised,
    make_tiles,
    run_product,
)
from quire.kernels.cpu.region import launch

KINDS = {
    "q4_1": (4, 32, "halves", "halves"),
    "q4_0": (4, 32, "halves", "centred"),
    "gptq": (4, 128, "floats", "floats"),
    "q8_0": (8, 32, "halves", "none"),
    "q6_k": (8, 16, "units", "none"),
    "q4_k": (4, 32, "units", "units"),
    "q2_k": (4, 16, "units", "units"),
    "floats": (8, 16, "floats", "none"),
    "awq": (8, 64, "halves", "floats"),
    "rows": (8, 0, "floats", "none"),
}
"""Bits, group (0: the whole row), and how scales and minimums are stored."""


def make_weight(kind: str, rows: int, groups: int, seed: int = 0) -> GroupedWeight:
    bits, size, scales, minimums = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    columns = groups * (size or 32)
    if bits == 4:
        quants = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    else:
        quants = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    shape = (rows, groups if size else 1)
    scale = 0.01 + torch.rand(shape, generator=generator)
    least = -torch.rand(shape, generator=generator) * 4
    scale, least = (
        part.half().float() if how == "halves" else in_units(part, size) if how == "units" else part
        for part, how in ((scale, scales), (least, minimums))
    )
    minimum = {"none": None, "centred": -8 * scale}.get(minimums, least)
    return GroupedWeight(quants, scale, minimum, bits, size or columns)


def in_units(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Round to 6 or 8 bits times a float16 for each 256 features, as K-quants have it."""
    blocks = F.pad(numbers, (0, -numbers.shape[1] % (256 // size))).view(-1, 256 // size)
    most = torch.where(torch.arange(len(blocks)) % 5 == 0, 128.0, 63.0)[:, None]
    unit = (blocks.abs().amax(dim=1, keepdim=True) / most).half().float()
    steps = (blocks / unit).round().clamp(-most, most)
    return (steps * unit).view(len(numbers), -1)[:, : numbers.shape[1]]


class Rows(NamedTuple):
    """Quantised rows of x, taken apart: numbers `[rows, groups, group]`, the others `[rows,
    groups]`."""

    numbers: np.ndarray[Any, Any]
    steps: np.ndarray[Any, Any]
    sums: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]


def quantised(weight: IntegerWeight, x: np.ndarray[Any, Any]) -> Rows:
    room = make_quantised(len(x), weight.depth, weight.num_groups)
    launch(*weight.quantise(x, room, make_tiles(1)), count_few(len(x)), len(x), 1)
    records = room.records.reshape(len(x), weight.num_groups, HEAD_BYTES + weight.group)
    heads = np.ascontiguousarray(records[..., :12])
    steps, sums = (heads[..., at : at + 4].copy().view(np.float32)[..., 0] for at in (0, 4))
    offsets = heads[..., 8:].copy().view(np.int32)[..., 0]
    return Rows(records[..., HEAD_BYTES:].view(np.int8), steps, sums, offsets)


def test_rows_are_rounded_to_a_127th_of_the_greatest_of_their_group() -> None:
    weight = pack_weight(make_weight("q4_1", 3, 4), None)
    assert isinstance(weight, IntegerWeight)
    x = np.random.default_rng(0).standard_normal((9, 128), dtype=np.float32)
    x[2, 32:64] = 0
    x[3, 40] = 1e4
    x[4, :32] *= 1e-32  # too small for a step
    numbers, steps, sums, offsets = quantised(weight, x)
    groups = x.reshape(9, 4, 32).astype(np.float64)
    most = np.abs(groups).max(axis=2)
    most[most < 1e-30] = 0
    np.testing.assert_allclose(steps, most / 127, rtol=2e-7)
    integers = numbers.astype(np.int64)
    assert np.abs(integers).max() == 127
    scaled = np.divide(groups * 127, most[..., None], where=most[..., None] > 0, out=0 * groups)
    assert np.abs(integers - scaled).max() < 0.5001
    added = integers.sum(axis=2)
    np.testing.assert_allclose(sums, steps * added, rtol=2e-7)
    assert np.array_equal(offsets, -128 * added)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_makes_its_row_not_finite_and_no_other(number: float) -> None:
    weight = pack_weight(make_weight("q4_1", 40, 4), None)
    x = np.ones((8, 128), np.float32)
    x[5, 77] = number
    out = np.empty((8, 40), np.float32)
    run_product(weight, x, len(x), out, 1)
    assert not np.isfinite(out[5]).any() and np.isfinite(np.delete(out, 5, axis=0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_exact_and_products_are_within_a_millionth(kind: str) -> None:
    """There are more rows than in an item, partial panels, and more groups than in one pass."""
    for rows, groups in ((70, 3), (7, 2048 // (KINDS[kind][1] or 32))):
        given = make_weight(kind, rows, groups)
        weight = pack_weight(given, torch.arange(float(rows)))
        assert isinstance(weight, IntegerWeight)
        assert torch.equal(unpack(weight, *given.shape), given.dense())
        generator = np.random.default_rng(groups)
        x = generator.standard_normal((101, given.shape[1]), dtype=np.float32)
        room = quantised(weight, x)
        numbers = room.numbers.astype(np.float64)
        integers = given.integers().numpy().reshape(rows, -1, weight.group).astype(np.float64)
        exact = np.einsum("rgk,ogk->rog", numbers, integers)  # of integers below 2^53
        steps = room.steps[:, None].astype(np.float64)
        repeats = exact.shape[2] // given.scale.shape[1]
        terms = exact * steps * given.scale.double().numpy().repeat(repeats, axis=1)
        if given.minimum is not None:
            least = given.minimum.double().numpy().repeat(repeats, axis=1)
            terms = np.concatenate((terms, numbers.sum(axis=2)[:, None] * steps * least), axis=2)
        out = np.empty((101, rows), np.float32)
        run_product(weight, x, 101, out, 1)
        wanted = terms.sum(axis=2) + np.arange(rows)
        error = np.abs(out - wanted) / (np.abs(terms).sum(axis=2) + np.arange(rows))
        assert error.max() < 1e-6
        # Each group's integers by themselves, to the last one: a row of one group and step 1.
        for group in range(min(groups, 3)):
            alone = np.zeros_like(x[:1])
            begin = group * weight.group
            alone[0, begin : begin + weight.group] = room.numbers[0, group]
            alone[0, begin] = 127
            part = pack_weight(
                given._replace(scale=torch.ones_like(given.scale), minimum=None), None
            )
            run_product(part, alone, 1, out[:1], 1)
            products = given.integers().numpy().astype(np.int64) @ alone[0].astype(np.int64)
            assert np.array_equal(out[0].astype(np.int64), products)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(("depth", "columns"), [(20, 40), (1100, 7)])
@torch.no_grad()
def test_rounded_layers(quantization: str, depth: int, columns: int) -> None:
    """The last group of features is not full."""
    linear = nn.Linear(depth, columns)
    linear.weight[5] = 0
    weight, bias = linear.weight.detach().clone(), linear.bias.detach()
    packed = PackedLinear(linear, quantization=quantization)
    assert isinstance(packed.packed, IntegerWeight) and linear.weight.numel() == 0
    bound = weight.abs().amax(dim=1, keepdim=True) / (127 if quantization == "int8" else 7.4)
    assert ((packed.weight - weight).abs() <= bound * 0.5001).all()
    assert len(packed.weight[0].unique()) > 10
    x = torch.randn(2, 13, depth)
    expected, actual = F.linear(x, packed.weight, bias), packed(x)
    assert (actual - expected).norm() < 0.01 * expected.norm()
    alone = torch.stack([packed(x[1, row]) for row in range(13)])
    assert torch.equal(alone, actual[1])


def test_rounding_what_was_rounded_changes_nothing() -> None:
    """Units of scales would, so there are none."""
    weight = make_weight("q4_1", 9, 8)
    weight.quants.view(9, 8, 16)[..., 0] = 0xF0  # both ends of the range occur
    again = round_to_int4(weight.dense())
    assert torch.equal(again.quants, weight.quants)
    torch.testing.assert_close(again.dense(), weight.dense())


def test_rounding_has_units_that_cost_little() -> None:
    """4.5 bits a weight, and 4 bytes of units a row."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    weight[:, 100] *= 5
    rounded = round_to_int4(weight)
    packed = pack_weight(rounded, None)
    assert isinstance(packed, IntegerWeight) and packed.scales.dtype == np.int8
    assert packed.data.nbytes == 64 * 1024 * 9 // 16 and packed.units.nbytes == 64 * 4
    groups = weight.view(64, 32, 32)
    step = (groups.amax(dim=2) - groups.amin(dim=2)) / 15
    error = (rounded.dense().view(groups.shape) - groups).square().mean()
    assert error < 1.1 * step.square().mean() / 12  # that of rounding to the nearest step


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_takes_the_bytes_of_its_kind(kind: str) -> None:
    bits, size, scales, minimums = KINDS[kind]
    packed = pack_weight(make_weight(kind, 64, 2048 // (size or 32)), None)
    assert isinstance(packed, IntegerWeight)
    widths = {"floats": 32, "halves": 16, "units": 8, "none": 0, "centred": 0}
    head = (widths[scales] + widths[minimums]) / size if size else 0
    assert packed.data.nbytes == 64 * 2048 * (bits + head) / 8
    assert packed.units.nbytes == (64 * 8 * 4 if scales == "units" else 0)


@torch.no_grad()
def test_small_scales_keep_their_precision() -> None:
    weight = torch.randn(6, 64) * 1e-5
    rounded = round_to_int4(weight)
    assert ((rounded.dense() - weight).abs() <= rounded.scale.max() * 0.501).all()


def test_groups_that_fit_no_vector_are_made_dense() -> None:
    weight = make_weight("q4_1", 40, 3)
    scale, minimum = (part.repeat_interleave(4, dim=1) for part in weight[1:3])
    odd = weight._replace(group_size=8, scale=scale, minimum=minimum)
    layer = PackedLinear(GroupedLinear(odd, None, torch.float32))
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), F.linear(x, odd.dense()), rtol=1e-5, atol=1e-4)


AVX2 = "+sse4.2,+ssse3,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt"
ISAS = {
    "vnni": ("", None, 16),
    "madd": ("haswell", AVX2, 8),
    "plain": ("sandybridge", AVX2.replace("+avx2", "-avx2"), 8),
    "madd of 512 bits": ("skylake-avx512", AVX2 + ",+avx512f,+avx512bw,+avx512vl,+avx512dq", 16),
}
"""Names of processors and what they have: each makes another choice in `dots.py`."""


def isa_environment(cpu: str, features: str | None) -> dict[str, str]:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "2"}
    if features is None:  # this processor
        return environment
    return environment | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}


@pytest.mark.skipif(not FEATURES.get("fma"), reason="the others are subsets of what x86 has")
def test_every_way_to_multiply_bytes_gives_the_same_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((9, 320), dtype=np.float32)
    x[4, 7] = 1000
    given = {"x": x}
    for bits, kind in ((4, "q4_1"), (8, "q8_0")):
        weight = make_weight(kind, 45, 10)
        least = make_weight("q4_1", 45, 10, seed=2).minimum
        assert least is not None
        given |= {f"quants{bits}": weight.quants.numpy(), f"scale{bits}": weight.scale.numpy()}
        given[f"least{bits}"] = least.numpy()
    given["quants8"][3, :64] = -128  # 128 times 127, twice in 16 bits
    np.savez(tmp_path / "in.npz", **given)
    found = {}
    for name, (cpu, features, lanes) in ISAS.items():
        if lanes > LANES or (features is None and dots.PATH != "vnni"):
            continue
        out = tmp_path / f"{name}.npz"
        child = Path(__file__).with_name("integer_child.py")
        arguments = [name.split()[0], str(lanes), str(tmp_path / "in.npz"), str(out)]
        command = [sys.executable, "-P", str(child), *arguments]
        subprocess.run(command, env=isa_environment(cpu, features), check=True)
        found[name] = np.load(out)
    assert len(found) >= 2
    first, *others = found.values()
    for other in others:
        for key in first:
            np.testing.assert_array_equal(first[key], other[key], err_msg=key)
    dense = given["quants8"].astype(np.float64).reshape(45, 10, 32) * given["scale8"][..., None]
    dense += given["least8"][..., None]
    exact = x.astype(np.float64) @ dense.reshape(45, 320).T
    assert np.abs(first["out8"] - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("path", "triple", "features", "instruction", "lanes"),
    [
        ("sdot", "aarch64-linux-gnu", "+dotprod", "sdot", 8),
        ("plain", "aarch64-linux-gnu", "", "mul", 8),
        ("vnni", "x86_64-linux-gnu", "+avx2,+avxvnni", "vpdpbusd", 8),
        ("vnni", "x86_64-linux-gnu", "+avx512vnni,+avx512vl", "vpdpbusd", 8),
    ],
)
def test_ways_of_processors_that_this_one_is_not_compile(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    triple: str,
    features: str,
    instruction: str,
    lanes: int,
) -> None:
    words, octets = (
        ir.VectorType(ir.IntType(32), lanes),
        ir.VectorType(ir.IntType(8), 4 * lanes),
    )
    for name, value in {"PATH": path, "LANES": lanes, "WORDS": words, "BYTES": octets}.items():
        monkeypatch.setattr(dots, name, value)
    monkeypatch.setattr(dots, "_BITS", 32 * lanes)
    module = ir.Module()
    kind = ir.FunctionType(words, [words, octets, octets])
    for bits in (4, 8):
        function = ir.Function(module, kind, f"dot{bits}")
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(dots.dot(builder, *function.args, bits))
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple).create_target_machine(features=features)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    assert instruction in target.emit_assembly(parsed)
