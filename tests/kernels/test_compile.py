"""What Triton makes of each kernel for sm_80 and sm_90, on a machine with no GPU.

No spills and 16-byte moves where the KV cache is read or written, tensor cores where there are
matmuls, and shared memory within the device's limit; the same figures stand in docs/kernels.md.
"""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from launches import LAUNCHES, SHARED_LIMITS, compiled, table  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global \S.*, (16|0x10)")
WIDE_STORE = re.compile(r"st\.global[\w.:]*\.v4\.b32")


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_resources(name: str, arch: int) -> None:
    for kernel in compiled(name, arch):
        assert kernel.spills == 0, kernel[:4]
        assert kernel.registers <= 255
        assert kernel.shared <= SHARED_LIMITS[arch]


@pytest.mark.parametrize("arch", SHARED_LIMITS)
@pytest.mark.parametrize(
    "name", [name for name in LAUNCHES if name.startswith(("extend", "decode"))]
)
def test_attention_reads_16_bytes_at_a_time_into_tensor_cores(name: str, arch: int) -> None:
    kernel = compiled(name, arch)[-1]
    copies = [line for line in kernel.ptx.splitlines() if "cp.async.c" in line and "shared" in line]
    assert copies and all(" 0x10" in line or ", 16" in line for line in copies), copies[:2]
    wgmma = "wgmma.mma_async" in kernel.ptx
    assert wgmma == (arch == 90 and name.startswith("extend"))
    assert wgmma or "mma.sync" in kernel.ptx


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "write" in name or "copy" in name])
def test_moves_of_cache_rows_are_16_bytes_wide(name: str) -> None:
    ptx = compiled(name, 90)[-1].ptx
    assert WIDE_LOAD.search(ptx) and WIDE_STORE.search(ptx)


def test_table_in_the_docs_is_current() -> None:
    """Names, shared memory and spills must agree; registers may differ with the compiler."""

    def facts(text: str) -> list[list[str]]:
        rows = [line.strip("|").split("|") for line in text.splitlines() if "`" in line]
        return [[cell.strip() for cell in (row[0], row[1], row[3], row[4])] for row in rows]

    written = DOCS.read_text().split("<!-- resources -->")[1]
    assert facts(written) == facts(table())


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        LAUNCHES["copy blocks"]()
