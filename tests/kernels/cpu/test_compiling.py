"""Test which kernels are compiled before a start is over, and in which process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.devices.cpu import first_start
from quire.kernels.cpu import ahead, region
from quire.kernels.cpu.ahead import Build
from quire.kernels.cpu.kernel import Kernel, Packed, Signature, Work, signature_of
from quire.kernels.cpu.norms import Pick, pick
from quire.kernels.cpu.region import compile_all, is_compiled, launch

from ...engine.checkpoints.gguf_files import write_model
from ...engine.models import COMMON, build_model
from ...engine.worker_driver import Driver, make_config, make_sequence
from . import norm_child

BUILDS = [
    Build("float32", "float32"),
    Build("bfloat16", "bfloat16"),
    Build("float32", "float32", "int8"),
    Build("float32", "float32", "int4"),
]


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_steps_use_exactly_the_kernels_that_are_compiled_ahead(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, Signature]] = set()
    address = Kernel.address

    def recorded(self: Kernel, work: Work) -> int:
        seen.add((self.name, signature_of(work)))
        return address(self, work)

    monkeypatch.setattr(Kernel, "address", recorded)
    # Wide enough that scales of 4-bit weights share units.
    build_model(
        LlamaConfig(**COMMON | {"hidden_size": 128, "intermediate_size": 128})
    ).save_pretrained(tmp_path)
    config = make_config(tmp_path, dtype=build.dtype, quantization=build.quantization or None)
    driver = Driver.start(config)
    tasks = {(kernel.name, kind) for kernel, kind in ahead.tasks_for(build)}
    assert seen == tasks
    draws: list[dict[str, Any]] = [{"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.7}]
    driver.run([make_sequence([5, 6, 7], 3, seed=1, **draw) for draw in ({}, *draws)])
    assert seen == tasks


def test_of_a_checkpoint_of_4_bits_all_but_products_are_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Build] = []
    monkeypatch.setattr(ahead, "compile_ahead", builds.append)
    seen: set[tuple[str, Signature]] = set()
    address = Kernel.address

    def recorded(self: Kernel, work: Work) -> int:
        seen.add((self.name, signature_of(work)))
        return address(self, work)

    write_model(tmp_path / "tiny.gguf", "llama-tied", "Q4_0")
    config = make_config(tmp_path / "tiny.gguf", dtype="float32")
    first_start.compile_ahead(config)
    first_start.compile_ahead(make_config(tmp_path / "none.gguf", dtype="float32"))
    assert builds == [Build("float32", "float32", ahead.KEPT), Build("float32", "float32")]
    monkeypatch.setattr(Kernel, "address", recorded)
    Driver.start(config)
    tasks = {(kernel.name, kind) for kernel, kind in ahead.tasks_for(builds[0])}
    assert tasks < seen
    others = {name for name, _ in seen - tasks}
    assert others == {"multiply_integers", "multiply_gated_integers", "fetch"}


def test_the_compiling_process_fills_the_cache_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from quire.kernels.cpu import ahead, region;"
        "build = ahead.Build('float32', 'float32');"
        "tasks = [task for task in ahead.tasks_for(build) if task[0].name == 'pick'];"
        "assert not region.is_compiled(tasks);"
        "ahead.tasks_for = lambda *_, **__: tasks;"
        "sys.argv = ['', 'float32'];"
        "ahead.main();"
        "assert region.is_compiled(tasks) and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-P", "-c", code]
    subprocess.run(command, env={"NUMBA_CACHE_DIR": str(tmp_path)}, check=True)
    assert len(list(tmp_path.rglob("norms.pick*.nbc"))) == 1


def test_a_compiled_kernel_computes_the_same_bits_as_one_from_the_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-P", norm_child.__file__]
    first, second = (
        json.loads(subprocess.check_output(command, env={"NUMBA_CACHE_DIR": str(tmp_path)}))
        for _ in range(2)
    )
    assert not first["loaded"] and second["loaded"]
    assert first["bits"] == second["bits"]
    # The function of a row's norm is not inlined on every processor, but never shared.
    entries = [line for line in first["functions"] if not line.startswith("define internal ")]
    assert len(entries) == 1 and "@cfunc." in entries[0]


def test_a_process_is_started_only_if_there_is_something_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command)

        def wait(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    monkeypatch.setattr(ahead, "is_compiled", lambda _: False)
    ahead.compile_ahead(Build("float64", "float64"))
    assert commands == []
    ahead.compile_ahead(Build("bfloat16", "float16", "int8"))
    assert [command[-4:] for command in commands] == [
        [ahead.__name__, "bfloat16", "float16", "int8"]
    ]
    monkeypatch.setattr(ahead, "is_compiled", lambda _: True)
    ahead.compile_ahead(Build("float32", "float32"))
    assert len(commands) == 1


def test_the_log_reports_the_wait_for_compilation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    choice = Pick(np.ones((2, 3)), np.array([1]), np.zeros((1, 3)))
    tasks = [(pick, signature_of(choice))]
    monkeypatch.setattr(region, "is_compiled", lambda _: False)
    compile_all(tasks)
    assert "once" in caplog.messages[0] and "are compiled, after" in caplog.messages[1]
    monkeypatch.undo()
    caplog.clear()
    assert is_compiled(tasks)
    compile_all(tasks)
    assert caplog.messages == []


def test_a_kernel_sees_the_fields_of_its_work() -> None:
    source = np.arange(12, dtype=np.float32).reshape(4, 3)
    choice = Pick(source, np.array([3, 1]), np.zeros((2, 3), np.float32))
    launch(pick, choice, 1, 2, 1)
    assert np.array_equal(choice.out, source[[3, 1]])


def test_arrays_of_a_work_are_contiguous() -> None:
    with pytest.raises(AssertionError):
        Packed(Pick(np.zeros((2, 3)).T, np.array([1]), np.zeros((1, 2))))


def test_an_updated_work_has_the_same_words_as_a_new_one() -> None:
    source, picks, out = np.zeros((2, 3)), np.array([1]), np.zeros((1, 3))
    packed = Packed(Pick(source, picks, out))
    longer = np.array([1, 0, 1])
    assert packed.update(Pick(source, longer, out))
    assert np.array_equal(packed.words, Packed(Pick(source, longer, out)).words)
    assert packed.words.tolist() == [
        *(source.ctypes.data, 2, 3),
        *(longer.ctypes.data, 3),
        *(out.ctypes.data, 1, 3),
    ]
    assert packed.address == packed.words.ctypes.data  # as the table of phases has it
    assert not packed.update(Pick(source, longer.astype(np.int32), out))
    assert not packed.update(Pick(source[None], longer, out))
