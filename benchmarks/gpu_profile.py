"""Where the time of a step goes on the device, by torch's profiler."""

from __future__ import annotations

import time

import torch
from gpu_workloads import Bench, Result
from torch.profiler import ProfilerActivity, profile

STEPS = 20
SHOWN = 12
"""Kernels in the result, those that take most."""
_WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def profile_steps(bench: Bench, batch: int, *, arriving: int = 0) -> Result:
    """Profile steps of `batch` decoding sequences, while prompts of the shorter context arrive:
    `arriving` of them, one at a time.

    `idle` is the share of the wall time in which no kernel runs, `waits` that in which the host
    waits for the device: 0 means that the host is the limit. The profiler itself slows the host.
    """
    names = bench.start_decodes(bench.prompts_to_profile(batch), 4 * STEPS)
    if isinstance(names, str):
        return {"skipped": names}
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    late = bench.prompts_to_profile(batch + 1)[:arriving]
    steps = min(STEPS, bench.sizes.steps)
    try:
        with profile(activities=activities) as found:
            begin = time.perf_counter()
            for index in range(steps):
                if index % 4 == 0 and late:
                    names.append(f"late {batch} {len(late)}")
                    bench.engine.add(names[-1], late.pop(), steps)
                bench.engine.step()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
    finally:
        bench.end_decodes(names)
    averages = found.key_averages()
    kernels = [
        (
            event.key,
            event.self_device_time_total if on_gpu else event.self_cpu_time_total,
            event.count,
        )
        for event in averages
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    busy = sum(us for _, us, _ in kernels)
    waiting = sum(event.cpu_time_total for event in averages if event.key in _WAITS)
    return {
        "step_us": seconds / steps * 1e6,
        "idle": max(0.0, 1 - busy / 1e6 / seconds),
        "waits": waiting / 1e6 / seconds,
        "kernels": [
            {"name": name[:80], "us_per_step": us / steps, "count_per_step": count / steps}
            for name, us, count in kernels[:SHOWN]
        ],
    }
