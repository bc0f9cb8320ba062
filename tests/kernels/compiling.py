"""Compile a launcher's kernels for a GPU that is not present, and read the result.

The launcher runs on CPU tensors with `JITFunction.run` replaced, so exactly what it would launch is
compiled, with its constants, alignments and options.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quire.kernels import checks
from quire.kernels.cuda import tuning

OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Compiled(NamedTuple):
    """A compiled kernel and the resources that it needs."""

    name: str
    registers: int
    spills: int
    """Bytes of spill stores and loads per thread."""
    shared: int
    """Bytes of shared memory per program."""
    ptx: str
    cubin: bytes


def _canonical(value: object) -> str:
    """Return Triton's name for the type of a kernel argument."""
    import torch

    if isinstance(value, torch.Tensor):
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
        names |= {"int64": "i64", "uint8": "u8", "float8_e4m3fn": "fp8e4nv", "float64": "fp64"}
        return "*" + names[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel argument: {value!r}")


def _source(function: JITFunction, values: dict[str, Any]) -> ASTSource:
    """Specialise the arguments as Triton's launcher does.

    1 and None become constants, and divisibility by 16 is noted.
    """
    import torch

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for param in function.params:
        value = values[param.name]
        key = (param.num,)
        fixed = value is None or (
            not param.do_not_specialize and isinstance(value, int) and value == 1
        )
        if param.is_constexpr or fixed:
            signature[param.name] = "constexpr"
            constants[key] = value
            continue
        signature[param.name] = _canonical(value)
        tensor = isinstance(value, torch.Tensor)
        aligned = 0 if tensor else value
        fixed = param.do_not_specialize_on_alignment if tensor else param.do_not_specialize
        if isinstance(aligned, int) and aligned % 16 == 0 and not fixed:
            attributes[key] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def _assemble(ptx: str, arch: int) -> tuple[int, int, bytes]:
    """Return the registers and the spilled bytes that ptxas reports, and its machine code."""
    from triton.backends.nvidia.compiler import get_ptxas

    found = get_ptxas(arch)
    ptxas = found.path if hasattr(found, "path") else found[0]
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", str(source)]
        target = Path(folder, "kernel.cubin")
        command += ["-o", str(target)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        cubin = target.read_bytes()
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spills, log
    return int(registers[1]), int(spills[1]) + int(spills[2]), cubin


def compile_launch(launch: Callable[[], object], arch: int) -> list[Compiled]:
    """Compile for sm_<arch> every kernel that `launch()` would start."""
    results: list[Compiled] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        compiled = triton.compile(
            _source(self, values), target=GPUTarget("cuda", arch, 32), options=options
        )
        ptx = compiled.asm["ptx"]
        registers, spills, cubin = _assemble(ptx, arch)
        results.append(
            Compiled(self.__name__, registers, spills, compiled.metadata.shared, ptx, cubin)
        )

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(checks, "interpreting", lambda: True),  # so that CPU tensors are taken
        mock.patch.object(tuning, "compute_capability", lambda device: arch),
    ):
        launch()
    return results
