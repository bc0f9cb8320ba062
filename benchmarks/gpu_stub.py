"""A GPU that is not there: Triton's launches are compiled for it, or left out.

Tensors are on torch's meta device, which has shapes and no memory, and whatever is read of them is
zero. So the cases of the other scripts run to their last line on any machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class StubDriver:
    """What Triton asks of its driver before it launches a kernel."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoResults(TorchFunctionMode):
    """Reads of a meta tensor's values give zeros, and comparisons are true."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "meta":
            kwargs.pop("generator", None)
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta and function in _READS:
            return _READS[function](first)
        return function(*args, **kwargs)


_READS: dict[Any, Callable[[Tensor], object]] = {
    Tensor.__bool__: lambda _: True,
    Tensor.__int__: lambda _: 0,
    Tensor.__float__: lambda _: 0.0,
    Tensor.item: lambda _: 0,
    Tensor.tolist: lambda tensor: torch.zeros(tensor.shape, dtype=torch.int64).tolist(),
    torch.equal: lambda _: True,
}


def _call_once(calls: list[Callable[[], object]], replays: int = 9) -> float:
    calls[0]()
    return 1e-6


def _call_now(launch: Callable[[], None]) -> Callable[[], None]:
    launch()
    return lambda: None


@contextlib.contextmanager
def stub_gpu(capability: int, *, compiles: bool) -> Iterator[None]:
    """Within this context, the cases run as on a GPU of this compute capability (90 for 9.0).

    Each kernel that they launch is compiled into Triton's cache if `compiles`, else left out.
    """
    import gpu_attention_checks
    import gpu_blocks
    import gpu_checks
    import gpu_common
    import gpu_experts
    import gpu_lora
    import gpu_products
    import gpu_states
    import gpu_step_checks
    import gpu_times

    from quire.kernels import checks
    from quire.kernels.cuda import tuning

    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if compiles:
            launch(kernel, *args, grid=grid, warmup=True, **options)

    with contextlib.ExitStack() as stack:
        for module in (
            gpu_attention_checks, gpu_checks, gpu_common, gpu_experts, gpu_lora, gpu_products,
            gpu_states, gpu_step_checks, gpu_times,
        ):  # fmt: skip
            for name, value in {
                "DEVICE": "meta", "time_graph": _call_once, "capture": _call_now,
            }.items():  # fmt: skip
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        patches = {
            (JITFunction, "run"): run,
            (checks, "interpreting"): lambda: True,  # so that tensors of no GPU are taken
            (tuning, "compute_capability"): lambda device: capability,
            (torch.cuda, "synchronize"): lambda *_: None,
            (driver, "_active"): StubDriver(capability),
        }
        for (owner, name), value in patches.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        # Copies to host memory are of numbers: few of them, on the CPU.
        stack.enter_context(mock.patch.multiple(gpu_blocks, DEVICE="cpu", **gpu_blocks.SMALL))
        settings = torch.fx.experimental._config
        stack.enter_context(settings.patch(meta_nonzero_assume_all_nonzero=True))
        stack.enter_context(NoResults())
        yield
