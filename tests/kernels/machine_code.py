"""Reading a kernel's machine code (SASS) for registers that are written while a product reads them.

On sm_90 a product (`HGMMA`, PTX's wgmma) runs beside the instructions after it until the warp group
waits for it (`WARPGROUP.DEPBAR`). Nothing may write the registers of its first operand or of its
sums before. Releases of ptxas are known to let that happen (triton-lang/triton#11781, #9433).
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s*(?P<text>[^;]+);")
_LABEL = re.compile(r"^(?P<name>\.L_\w+):")
_REGISTER = re.compile(r"^R(\d+)$")
_STORES = ("ST", "RED", "BAR", "LDGSTS", "LDGDEPBAR", "BRA", "EXIT", "WARPGROUP", "SYNCS", "UTMA")
_WIDTHS = {"64": 2, "128": 4, "WIDE": 2, "4": 4, "2": 2}


class Instruction(NamedTuple):
    """One instruction: its name with all suffixes, and its operands."""

    name: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.operands)}"


class Program(NamedTuple):
    """A kernel's instructions in order, and the index to which each label points."""

    instructions: list[Instruction]
    labels: dict[str, int]


def disassemble(cubin: bytes) -> Program:
    """Read the machine code of a compiled kernel with the disassembler that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> Program:
    """Read nvdisasm's output."""
    program = Program([], {})
    for line in text.splitlines():
        if label := _LABEL.match(line):
            program.labels[label["name"]] = len(program.instructions)
        elif found := _LINE.match(line):
            words = found["text"].split(maxsplit=1)
            if words[0].startswith("@"):
                words = words[1].split(maxsplit=1)
            operands = words[1].split(",") if len(words) > 1 else []
            program.instructions.append(
                Instruction(words[0], tuple(operand.strip() for operand in operands))
            )
    return program


def _registers(operand: str, count: int) -> frozenset[int]:
    found = _REGISTER.match(operand.removesuffix(".reuse"))
    return frozenset(range(int(found[1]), int(found[1]) + count)) if found else frozenset()


def _product_registers(product: Instruction) -> frozenset[int]:
    """Return the registers that a product reads and writes until it is waited for: its sums, a
    float32 for each of N / 2 elements, and its first operand's 4 if it is not in shared memory."""
    columns = int(product.name.split(".")[1].split("x")[1])
    sums = _registers(product.operands[0], columns // 2)
    return sums | _registers(product.operands[1], 4)


def _written(instruction: Instruction) -> frozenset[int]:
    """Return the registers that an instruction other than a product writes."""
    if not instruction.operands or instruction.name.startswith(_STORES):
        return frozenset()
    suffixes = instruction.name.split(".")[1:]
    if instruction.name.startswith("LDSM"):
        count = int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    else:
        loads = instruction.name.startswith(("LD", "IMAD.WIDE"))
        count = max([1, *(_WIDTHS.get(suffix, 1) for suffix in suffixes if loads)])
    target = instruction.operands[0]
    if target in ("PT", "P0", "P1", "P2", "P3", "P4", "P5", "P6") and len(instruction.operands) > 1:
        target = instruction.operands[1]  # a shuffle, or a comparison: predicate first
    return _registers(target, count)


def early_writes(program: Program) -> list[str]:
    """Return the instructions that write a register of a product that may still run.

    Follows branches until the products are waited for. Predicates are taken to hold.
    """
    suspects: dict[int, str] = {}
    groups: tuple[frozenset[int], ...]
    paths: list[tuple[int, tuple[frozenset[int], ...], frozenset[int]]] = [
        (index, (), frozenset())
        for index, instruction in enumerate(program.instructions)
        if instruction.name == "WARPGROUP.ARRIVE"
    ]
    seen = set()
    while paths:
        index, groups, current = paths.pop()
        while index < len(program.instructions) and (index, groups, current) not in seen:
            seen.add((index, groups, current))
            instruction = program.instructions[index]
            index += 1
            if instruction.name.startswith("HGMMA"):
                current |= _product_registers(instruction)
                if "gsb0" in instruction.operands:
                    groups, current = (*groups, current), frozenset()
            elif instruction.name.startswith("WARPGROUP.DEPBAR"):
                left = int(instruction.operands[-1], 16)
                groups = groups[len(groups) - left :] if left else ()
            elif _written(instruction) & current.union(*groups):
                suspects[index] = str(instruction)
            if instruction.name == "BRA" and (groups or current):
                label = re.search(r"\.L_\w+", instruction.operands[-1])
                if label is not None:
                    paths.append((program.labels[label[0]], groups, current))
            if not groups and not current and not instruction.name.startswith("WARPGROUP.ARR"):
                break
    return [suspects[index] for index in sorted(suspects)]
