"""Test that one place chooses the device and nothing else checks which one it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quire.engine.devices.choose import choose_backend
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cuda.backend import CudaBackend
from quire.engine.devices.cuda.layers.kernels import TRITON_PDL
from quire.engine.devices.cuda.requirements import check_gpu
from quire.engine.errors import ConfigurationError

from ..worker_driver import make_config

ENGINE = Path(__file__).parents[3] / "engine"


def test_the_cpu_is_chosen_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        assert isinstance(choose_backend(make_config(Path("none"), device=device)), CpuBackend)
    with pytest.raises(ConfigurationError, match="no GPU"):
        choose_backend(make_config(Path("none"), device="cuda"))


def test_cuda_is_chosen_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _gpu(9, 0))
    for device in ("auto", "cuda"):
        backend = choose_backend(make_config(Path("none"), device=device))
        assert backend.device.type == "cuda"
    assert isinstance(choose_backend(make_config(Path("none"), device="cpu")), CpuBackend)


def _gpu(major: int, minor: int) -> SimpleNamespace:
    return SimpleNamespace(name="A GPU", major=major, minor=minor)


def test_a_gpu_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _gpu(7, 5))
    for device in ("auto", "cuda"):
        with pytest.raises(
            ConfigurationError, match=r"A GPU has compute capability 7\.5.*device cpu"
        ):
            choose_backend(make_config(Path("none"), device=device))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_dependent_launches_need_hopper(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _gpu(*capability))
    config = make_config(Path("none"), device="cuda", enable_pdl=True)
    if capability < (9, 0):
        with pytest.raises(ConfigurationError, match=r"--enable-pdl needs .* 9\.0 .* 8\.9"):
            choose_backend(config)
    else:
        backend = choose_backend(config)
        assert isinstance(backend, CudaBackend) and backend._kernels is TRITON_PDL
    with pytest.raises(ConfigurationError, match="--enable-pdl works only on a GPU"):
        choose_backend(make_config(Path("none"), device="cpu", enable_pdl=True))


def test_triton_releases_that_make_wrong_code() -> None:
    for capability in ((8, 0), (9, 0)):
        assert check_gpu("A GPU", capability, "3.6.0") is None
    for capability in ((9, 0), (10, 0)):
        assert check_gpu("A GPU", capability, "3.7.1+git1") is None
        with pytest.raises(ConfigurationError, match=r"3\.7\.0 makes wrong code"):
            check_gpu("A GPU", capability, "3.7.0")
    assert "install triton 3.7.1" in str(check_gpu("A GPU", (12, 0), "3.6.0"))


def test_a_gpu_computes_a_float32_checkpoint_in_bfloat16(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = CudaBackend(torch.device("cpu"))
    with caplog.at_level("INFO"):
        assert backend.default_dtype("float16") == "float16" and not caplog.records
        assert backend.default_dtype("float32") == "bfloat16"
    assert "--dtype" in caplog.text


def test_only_the_chosen_device_is_imported() -> None:
    code = (
        "import sys; from quire.engine.config import EngineConfig\n"
        "from quire.engine.devices.choose import choose_backend\n"
        "choose_backend(EngineConfig(model='none', device='cpu'))\n"
        "found = [name for name in sys.modules if name.startswith('quire.')]\n"
        "print(any('cuda' in name for name in found), any('.cpu.' in name for name in found))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_no_other_room_checks_the_type_of_a_device() -> None:
    devices = ENGINE / "devices"
    paths = [path for path in ENGINE.rglob("*.py") if devices not in path.parents]
    assert len(paths) > 50
    asking = re.compile(r"device\.type|is_cuda\b|from \.+kernels\.(cpu|cuda)")
    assert [path.name for path in paths if asking.search(path.read_text("utf-8"))] == []


def test_a_host_with_too_few_gpus_for_its_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    backend = CudaBackend(torch.device("cuda", 1))
    config = make_config(Path("none"), device="cuda", tensor_parallel_size=4)
    with pytest.raises(ConfigurationError, match="4 ranks on this host need as many GPUs, .* 2"):
        backend.check_ranks(config)
    backend.check_ranks(make_config(Path("none"), tensor_parallel_size=4, nnodes=2))
    assert chosen == [backend.device]
