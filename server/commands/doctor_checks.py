"""What `quire doctor` checks. Each check looks at one thing and says in one line what it found."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement

from ...engine.errors import ConfigurationError
from ...engine.main_memory import available_memory
from ..about import DISTRIBUTION, install_extra, quire_version
from ..setting_sources import origins_of, unknown_variables
from ..settings import Settings, read_settings
from .http_client import RequestError, Server

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub")
_CPU_PACKAGES = ("numba", "llvmlite", "numpy", "llguidance")
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "built_for": torch.version.cuda,
    "gpus": [[torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory,
              "%d.%d" % torch.cuda.get_device_capability(i)]
             for i in range(torch.cuda.device_count())] if cuda else [],
}))
"""
"""Run in a process of its own, since a broken torch may crash."""
_MIN_MEMORY, _MIN_DISK, _MIN_FILES = 2 * GIB, 5 * GIB, 4096
"""Below these there is a warning."""


class Check(NamedTuple):
    """What was looked at, whether it will do, and what was found."""

    name: str
    status: Status
    text: str


class _Torch(NamedTuple):
    """What torch says of itself: the GPUs (name, bytes, capability), or why it cannot be used."""

    built_for: str | None
    gpus: list[tuple[str, int, str]]
    problem: str | None


def all_checks() -> Iterator[Check]:
    """Yield the checks one by one; the slow ones last."""
    yield Check("quire", "ok", f"{quire_version()}, in {Path(__file__).parents[2]}")
    yield _python()
    yield from _packages(_PACKAGES + _CPU_PACKAGES)
    yield _extras()
    yield _cores()
    yield _memory()
    yield _files()
    yield from _folders()
    yield from _settings()
    torch = _ask_torch()
    yield _device(torch)
    yield _compiler(bool(torch.gpus))
    yield _choice(torch)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _packages(names: tuple[str, ...]) -> Iterator[Check]:
    """Compare installed versions with those that quire asks for."""
    try:
        wanted = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        wanted = []
    ranges = {
        each.name: each.specifier
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }
    for name in names:
        specifier = ranges.get(name)
        try:
            found = version(name)
        except PackageNotFoundError:
            status: Status = "warn" if name == "triton" else "fail"
            why = "only GPUs need it" if name == "triton" else "reinstall quire"
            yield Check(name, status, f"not installed; {why}")
            continue
        if specifier is None or specifier.contains(found, prereleases=True):
            yield Check(name, "ok", found)
        else:
            yield Check(name, "warn", f"{found}, but quire is tested with {specifier}")


def _extras() -> Check:
    """Say which optional formats can be read."""
    missing = []
    for extra, packages in (
        ("gguf", ("gguf", "accelerate")),
        ("quantized", ("compressed-tensors",)),
    ):
        for package in packages:
            try:
                version(package)
            except PackageNotFoundError:
                missing.append(extra)
                break
    if missing:
        commands = ", ".join(install_extra(extra) for extra in missing)
        return Check("formats", "warn", f"safetensors; not {' and '.join(missing)}: {commands}")
    return Check("formats", "ok", "safetensors, GGUF, quantised safetensors")


def _cores() -> Check:
    """Name the vector instructions, which decide how fast the CPU is, and the cores and limits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text, status = f"{cores} CPUs", "ok"
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if quota and quota[0] != "max":
        text += f", of which the control group grants {int(quota[0]) / int(quota[1]):.1f}"
    information = _read("/proc/cpuinfo")
    flags = set(next((x for x in information.splitlines() if x.startswith("flags")), "").split())
    if platform.machine() in ("x86_64", "AMD64") and flags:
        known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
        levels = [name for name in known if name in flags]
        text += f"; {', '.join(levels) or 'no AVX2'}"
        if "avx2" not in flags:
            text, status = text + ": the CPU's kernels will be slow", "warn"
    else:
        text += f"; {platform.machine()}"
    return Check("cpu", "warn" if status == "warn" else "ok", text)


def _memory() -> Check:
    free = available_memory()
    if free is None:
        return Check("memory", "warn", "this system does not say how much is free")
    text = f"{free / GIB:.1f} GiB free"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    text += f", control group's limit {int(limit) / GIB:.1f} GiB" if limit.isdecimal() else ""
    if free < _MIN_MEMORY:
        return Check("memory", "warn", f"{text}: only the smallest models fit")
    return Check("memory", "ok", text)


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_FILES:
        advice = f"each connection takes one; raise it: ulimit -n {min(hard, 65536)}"
        return Check("open files", "warn", f"{soft:,} at most; {advice}")
    return Check("open files", "ok", f"{soft:,} at most")


def _folders() -> Iterator[Check]:
    """Check that caches can be written, and that there is room for models."""
    from ...engine.checkpoints.hub import hub_cache

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    beside = Path(__file__).parents[2] / "kernels" / "cpu" / "__pycache__"
    kernels = Path(os.environ.get("NUMBA_CACHE_DIR") or beside)
    folders = {
        "hub cache": hub_cache(),
        "quire cache": cache / "quire",
        "kernel cache": kernels,
        "temp folder": Path(gettempdir()),
    }
    for name, folder in folders.items():
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not os.access(there, os.W_OK):
            status: Status = "fail" if name == "temp folder" else "warn"
            yield Check(name, status, f"{folder} cannot be written")
            continue
        free = shutil.disk_usage(there).free
        text = f"{folder}, {free / GIB:.0f} GiB free"
        if name == "hub cache" and free < _MIN_DISK:
            yield Check(name, "warn", f"{text}: too little for most models; move it by HF_HOME")
        else:
            yield Check(name, "ok", text)


def _settings() -> Iterator[Check]:
    """Check variables QUIRE_…, and the address that `quire serve` would listen on."""
    unknown = unknown_variables(Settings.model_fields)
    for variable, advice in unknown.items():
        yield Check("environment", "warn", f"{variable} is no setting: {advice}")
    try:
        settings = read_settings({})
        settings.engine_config()
    except ConfigurationError as error:
        yield Check("settings", "fail", error.message)
        return
    origins = origins_of({}, Settings.model_fields)
    given = sorted(name for name in Settings.model_fields if origins.kind(name) != "default")
    yield Check("settings", "ok", f"from the environment or a file: {', '.join(given) or 'none'}")
    yield _port(settings.host, settings.port)


def _port(host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Check("port", "fail", f"cannot listen on {host}:{port}: {error.strerror}")
        else:
            return Check("port", "ok", f"{port} of {host} is free")
    return Check("port", "warn", f"{port} of {host} is taken by {_listener(host, port)}")


def _listener(host: str, port: int) -> str:
    """Say what answers at an address that is taken."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    try:
        cards = Server(address).models(timeout=1.0)
    except RequestError as error:
        return "a server that asks for a key" if error.status == 401 else "another program: --port"
    return "a server of " + (", ".join(str(card["id"]) for card in cards) or "no model")


def _ask_torch() -> _Torch:
    """Import torch in a process of its own."""
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH], capture_output=True, text=True, timeout=120
        )
        said: dict[str, Any] = json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return _Torch(None, [], f"torch does not answer: {error}")
    if result.returncode or not said:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return _Torch(None, [], f"torch cannot be used: {last}")
    return _Torch(
        said["built_for"], [(name, size, level) for name, size, level in said["gpus"]], None
    )


def _device(torch: _Torch) -> Check:
    if torch.problem is not None:
        return Check("device", "fail", torch.problem)
    has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    if torch.gpus:
        named = [f"{name} ({size / GIB:.0f} GiB, sm_{level})" for name, size, level in torch.gpus]
        return Check(
            "device", "ok", f"{', '.join(named)}; torch is built for CUDA {torch.built_for}"
        )
    if has_driver and torch.built_for is None:
        return Check("device", "warn", "there is an NVIDIA GPU, but torch is a build for CPUs")
    if has_driver:
        return Check("device", "warn", "there is an NVIDIA driver, but torch sees no GPU")
    return Check("device", "ok", "no NVIDIA GPU: the CPU")


def _compiler(has_gpu: bool) -> Check:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is not None:
        return Check("compiler", "ok", found)
    if has_gpu:
        return Check("compiler", "fail", "no C compiler (cc, gcc), which Triton needs on a GPU")
    return Check("compiler", "ok", "no C compiler; only GPUs need one")


def _choice(torch: _Torch) -> Check:
    """Say what `quire serve` would choose by itself, and why."""
    device = os.environ.get("QUIRE_DEVICE") or "auto"
    if device == "cuda" and not torch.gpus:
        return Check("would use", "fail", "QUIRE_DEVICE is cuda, but torch sees no GPU")
    if torch.gpus and device != "cpu":
        name, size, _ = torch.gpus[0]
        share = Settings.model_fields["gpu_memory_utilization"].default
        return Check(
            "would use",
            "ok",
            f"{name}, in the checkpoint's dtype, {share * size / GIB:.0f} GiB for weights and KV "
            "cache (--gpu-memory-utilization)",
        )
    why = "QUIRE_DEVICE is cpu" if device == "cpu" else "torch sees no GPU"
    return Check(
        "would use",
        "ok",
        f"the CPU in float32, since {why}; K and V in float16 if the model bears it; "
        "--quantization int8 or int4 for larger models",
    )


def _read(path: str) -> str:
    """Return a file of the system, or nothing if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
