"""Test the machine code of each kernel for sm_80 and sm_90, on a machine without a GPU.

There must be no spills, 16-byte accesses to the KV cache, tensor cores for matmuls, and no more
shared memory than the device has. docs/kernels.md has a table of the same figures.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
import triton

sys.path.append(str(Path(__file__).parents[1]))
from compiling import compile_launch  # noqa: E402
from launches import (  # noqa: E402
    CHUNKED,
    COPY_SIZE,
    DEPENDENT,
    LAUNCHES,
    SHARED_LIMITS,
    compiled,
    dots,
    table,
    widest_load,
)
from machine_code import disassemble, early_writes, parse  # noqa: E402

DOCS = Path(__file__).parents[3] / "docs" / "kernels.md"
KERNELS = Path(__file__).parents[3] / "kernels"
WIDE_STORE = re.compile(r"st\.global[\w.:]*\.v4\.b32")


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_resources(name: str, arch: int) -> None:
    # Triton 3.6 spills two registers of wide decodes, to run two programs an SM.
    old = triton.__version__.startswith("3.6.") and "dim 512" in name
    for kernel in compiled(name, arch):
        assert kernel.spills <= (16 if old else 0), kernel[:4]
        assert kernel.registers <= 255
        assert kernel.shared <= SHARED_LIMITS[arch]


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("name", CHUNKED)
def test_resources_of_chunks(name: str, arch: int) -> None:
    """Prompts of layers with a window or chunks spill 64 bytes on sm_90."""
    for kernel in compile_launch(CHUNKED[name], arch):
        spills = 64 if (name, arch) == ("extend", 90) else 0
        assert kernel.spills <= spills and kernel.shared <= SHARED_LIMITS[arch], kernel[:4]


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize(
    "name", [name for name in LAUNCHES if name.startswith(("extend", "decode", "cascade"))]
)
def test_attention_reads_16_bytes_at_a_time_into_tensor_cores(name: str, arch: int) -> None:
    """With float8, `mma.sync` takes V from 8-byte copies: its rows' swizzle is half as wide.
    Decodes have too few rows for `wgmma`, unless many heads share a latent."""
    for kernel in compiled(name, arch):
        if kernel.name == "_build_decode_schedule_kernel":
            continue
        wgmma = "wgmma.mma_async" in kernel.ptx
        assert wgmma == (arch == 90 and ("decode" not in kernel.name or "128 heads" in name))
        assert wgmma or "mma.sync" in kernel.ptx
        sizes = COPY_SIZE.findall(kernel.ptx)
        narrow = "fp8" in name and not wgmma and (arch < 90 or "decode" not in kernel.name)
        assert sizes and set(sizes) == ({"0x10", "0x8"} if narrow else {"0x10"}), sizes


@pytest.mark.parametrize(
    "name",
    [name for name in LAUNCHES if name.startswith(("ext", "casc")) or "decode 128 heads" in name],
)
def test_no_register_is_written_while_a_product_reads_it(name: str) -> None:
    programs = [disassemble(kernel.cubin) for kernel in compiled(name, 90)]
    names = [instruction.name for program in programs for instruction in program.instructions]
    assert any(name.startswith("HGMMA") for name in names)
    assert [early_writes(program) for program in programs] == [[]] * len(programs)


def test_early_writes_are_found() -> None:
    """The second product's first operand is in registers, and the loop goes on before the wait."""
    code = """
.L_x_1:
        /*0010*/      FADD R40, R1, R2 ;
        /*0020*/      WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/      FADD R25, R24, R25 ;
        /*0040*/      WARPGROUP.ARRIVE ;
        /*0050*/      HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0060*/      HGMMA.64x32x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0070*/ @!P1 LDS.128 R124, [R23] ;
        /*0080*/      STS.128 [R23], R120 ;
        /*0090*/ @!P1 BRA `(.L_x_1) ;
        /*00a0*/      WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/      FADD R120, R1, R2 ;
"""
    assert early_writes(parse(code)) == []  # sums: R24 … R39 and R88 … R119
    for late, register in (("R40", "R39"), ("R124", "R123"), ("R124", "R90")):
        found = early_writes(parse(code.replace(late, register, 1)))
        assert len(found) == 1 and register in found[0]


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.endswith("fp8")])
def test_float8_is_widened_by_the_device_if_it_can(name: str) -> None:
    """sm_90 converts two numbers per instruction, sm_80 shifts bits; writes shift bits on both."""
    for kernel in compiled(name, 90):
        attends = "attention" in kernel.name or "prefixes" in kernel.name
        assert ("cvt.rn.f16x2.e4m3x2" in kernel.ptx) == attends
    assert "e4m3" not in compiled(name, 80)[-1].ptx


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "write" in name or "copy" in name])
def test_moves_of_cache_rows_are_16_bytes_wide(name: str) -> None:
    """With float8, the 16 bytes of K or V that a thread reads become 8."""
    ptx = compiled(name, 90)[-1].ptx
    assert widest_load(ptx) == 16
    assert ("st.global.v2.b32" in ptx) if "fp8" in name else WIDE_STORE.search(ptx)


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("product")])
def test_products_read_16_bytes_at_a_time_into_tensor_cores(name: str, arch: int) -> None:
    """A tile of 16 rows is too small for wgmma."""
    ptx = compiled(name, arch)[-1].ptx
    assert widest_load(ptx) == 16
    assert dots(ptx) == ("wgmma" if arch == 90 and "of 1 row" not in name else "mma.sync")


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if "in chunks" in name])
def test_states_pass_through_chunks_in_tensor_cores(name: str, arch: int) -> None:
    """A chunk of 64 tokens takes wgmma where there is any, whose registers nothing overwrites."""
    _, *kernels = compiled(name, arch)
    assert [kernel.name for kernel in kernels] == ["_relate_tokens_kernel", "_pass_chunks_kernel"]
    for kernel in kernels:
        assert dots(kernel.ptx) == ("wgmma" if arch == 90 else "mma.sync")
        assert widest_load(kernel.ptx) == 16
        if arch == 90:
            assert early_writes(disassemble(kernel.cubin)) == []


@pytest.mark.parametrize("name", ["decode 32/8 heads, dim 128, block 16, fp8"])
def test_float8_reaches_the_tensor_cores_as_float16_does(name: str) -> None:
    """Matrices are read out of shared memory whole, and no byte by itself, if both tiles fit."""
    (*_, kernel) = compiled(name, 90)
    names = [instruction.name for instruction in disassemble(kernel.cubin).instructions]
    assert any(".MT88" in name for name in names if name.startswith("LDSM"))
    assert not any(name.startswith("LDS.U8") for name in names)


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_launches_wait_before_they_touch_memory(name: str) -> None:
    (kernel,) = compile_launch(DEPENDENT[name], 90)
    assert kernel.spills == 0
    (begin,) = re.findall(r"griddepcontrol\.\w+", kernel.ptx)[:1]
    assert begin == "griddepcontrol.launch_dependents"
    before, _, after = kernel.ptx.partition("griddepcontrol.wait")
    touches = re.compile(r"(ld|st|atom|red)\.(global|relaxed|acquire)|cp\.async")
    assert not touches.search(before) and touches.search(after)


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_draws_divide_and_exponentiate_as_torch_does(arch: int) -> None:
    """Draws read logits 16 bytes at a time and use IEEE division and libdevice's exp.

    Triton's approximations only choose the bins: one division for each of three passes, and the
    exp of the bins' edges.
    """
    pieces = compiled("sample tokens unfiltered, 151936", arch)[0].ptx
    assert "div.rn.f32" in pieces and "div.full.f32" not in pieces
    assert "ex2.approx.f32" not in pieces and "ex2.approx.ftz.f32" in pieces
    ptx = compiled("sample tokens, 151936", arch)[-1].ptx
    assert widest_load(ptx) == widest_load(pieces) == 16
    assert ptx.count("div.full.f32") <= 3 < ptx.count("div.rn.f32")
    assert ptx.count("ex2.approx.f32") <= 4 < ptx.count("ex2.approx.ftz.f32")


def test_table_in_the_docs_is_current() -> None:
    """The compiler that made the table must reproduce it, with up to 8 registers more or less.

    Another compiler may lay out tiles differently, in at most a quarter more shared memory.
    """

    def facts(text: str) -> dict[tuple[str, str], list[str]]:
        rows = [line.strip("|").split("|") for line in text.splitlines() if "`" in line]
        return {
            (row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows
        }

    before, written = DOCS.read_text().split("<!-- resources -->")[:2]
    same_compiler = f"(triton {triton.__version__})" in before
    have, want = facts(table()), facts(written)
    assert have.keys() == want.keys()
    for launch, (registers, spills, shared, *instructions) in have.items():
        was = want[launch]
        assert [spills, *instructions] == [was[1], *was[3:]], launch
        assert int(shared) <= int(was[2]) * (1 if same_compiler else 1.25), launch
        same = shared == was[2] and abs(int(registers) - int(was[0])) <= 8
        assert same or not same_compiler, launch


def test_none_is_returned_only_by_bare_returns() -> None:
    """Triton 3.6 rejects `return None` and tuples that hold None; 3.7 accepts them."""
    for path in KERNELS.glob("cuda/**/*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any("triton.jit" in ast.unparse(one) for one in function.decorator_list):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                    assert not any(ast.unparse(part) == "None" for part in parts), function.name


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        LAUNCHES["copy blocks"]()
