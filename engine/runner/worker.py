"""The device's side of the engine: one model, one KV cache, one step at a time."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from ..config import EngineConfig, WorkerInfo
from ..devices.cuda.decode_graphs import CudaCapture, graph_sizes
from ..errors import ConfigurationError, UnsupportedModelError, one_line
from ..model.causal_lm import CausalLM
from ..model.kv_scales import read_kv_scales
from ..model.loader import load_model, resolve_kv_cache_dtype
from ..step import SchedulerOutput
from .kv_cache import allocate_kv_cache, cpu_cache_memory, num_blocks_from_memory
from .model_runner import ModelRunner, StepForward


class Worker:
    """Implements WorkerProtocol, which states the contract."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def load(self) -> WorkerInfo:
        config = self._config
        num_threads = config.num_threads or default_num_threads()
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._model: CausalLM = load_model(config)
        model, spec = self._model, self._model.spec
        self._cache_dtype = resolve_kv_cache_dtype(config, model.dtype, model.device)
        self._kv_scales: torch.Tensor | None = None
        if self._cache_dtype == torch.float8_e4m3fn and config.load_format != "dummy":
            scales = read_kv_scales(config.model, spec)
            self._kv_scales = None if scales is None else scales.to(model.device)
        self._max_model_len = spec.resolve_max_model_len(config.max_model_len)
        return WorkerInfo(
            architecture=spec.architecture,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            num_parameters=model.num_parameters,
            vocab_size=spec.vocab_size,
            max_model_len=self._max_model_len,
            kv_bytes_per_token=spec.kv_bytes_per_token(self._cache_dtype.itemsize),
            eos_token_ids=spec.eos_token_ids,
            embedding=spec.embedding,
            can_generate=model.can_generate,
            kv_cache_dtype=(
                None
                if self._cache_dtype == model.dtype
                else str(self._cache_dtype).removeprefix("torch.")
            ),
        )

    def profile(self) -> int:
        config, model = self._config, self._model
        spec = model.spec
        if model.device.type == "cuda":
            peak = self._peak_memory()
            memory = config.kv_cache_memory_bytes or self._cuda_cache_memory(peak)
        else:
            memory = cpu_cache_memory(config, spec, self._cache_dtype, self._max_model_len)
        num_blocks = num_blocks_from_memory(
            memory, config, spec, self._cache_dtype, self._max_model_len
        )
        self._runner = self._make_runner(num_blocks)
        if self._graph_sizes:
            self._capture(self._runner, self._graph_sizes)
        if model.device.type == "cpu":
            self._runner.warm_up()
        return num_blocks

    @property
    def _graph_sizes(self) -> list[int]:
        if self._model.device.type != "cuda" or self._config.enforce_eager:
            return []
        return graph_sizes(self._config.max_num_seqs)

    def forward(self, scheduler_output: SchedulerOutput) -> StepForward:
        return self._runner.forward(scheduler_output)

    def _make_runner(self, num_blocks: int) -> ModelRunner:
        model = self._model
        kv_cache = allocate_kv_cache(
            model.spec,
            num_blocks,
            self._config.block_size,
            self._cache_dtype,
            model.device,
            commit=self._config.kv_cache_memory_bytes is not None,
        )
        return ModelRunner(model, self._config, kv_cache, self._max_model_len, self._kv_scales)

    def _capture(self, runner: ModelRunner, sizes: list[int]) -> None:
        try:
            runner.capture_graphs(CudaCapture(self._model.device), sizes)
        except RuntimeError as error:
            raise ConfigurationError(
                f"the CUDA graphs of decode steps cannot be captured ({one_line(error)}): lower "
                "--gpu-memory-utilization if memory ran out, else use --enforce-eager"
            ) from error

    def _graph_memory(self) -> int:
        """Bytes that all graphs will take: the largest one, with the pool that they share, and for
        each other as much as the second largest takes beside it."""
        sizes = self._graph_sizes
        if not sizes:
            return 0
        first, both = (self._memory_of_graphs(sizes[-count:]) for count in (1, 2))
        return first + (len(sizes) - 1) * max(both - first, 0)

    def _memory_of_graphs(self, sizes: list[int]) -> int:
        runner = self._make_runner(1)
        before = _free_memory(self._model.device)
        self._capture(runner, sizes)
        return before - _free_memory(self._model.device)

    def _peak_memory(self) -> int:
        """Bytes that torch holds at the peak of the largest step. Every kernel of a step has been
        compiled and launched then."""
        from triton.errors import TritonError

        device, spec = self._model.device, self._model.spec
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            runner = self._make_runner(1)
            runner.compile_kernels()
            runner.run_largest_step()
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"a step of {self._config.token_budget(device.type)} tokens does not fit the "
                f"memory of {device} beside the model: lower --max-num-batched-tokens or "
                "--max-num-seqs"
            ) from error
        except (ValueError, TritonError) as error:  # a launcher refuses, a tile does not fit
            raise UnsupportedModelError(
                f"{spec.architecture}: its kernels do not run on {device}: {one_line(error)}"
            ) from error
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def _cuda_cache_memory(self, peak: int) -> int:
        """Bytes left within gpu_memory_utilization once the largest step has its room: what torch
        held at its `peak`, what others (context, libraries) hold, and the graphs."""
        device = self._model.device
        graphs = self._graph_memory()
        free, total = _free_memory(device), torch.cuda.mem_get_info(device)[1]
        others = total - free - torch.cuda.memory_reserved(device)
        return int(total * self._config.gpu_memory_utilization) - peak - others - graphs


def _free_memory(device: torch.device) -> int:
    """Bytes that the driver could give, once torch has given back what nobody holds."""
    gc.collect()  # a runner and its graphs hold each other
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def default_num_threads() -> int | None:
    """One thread per physical core that this process may use; None leaves OMP_NUM_THREADS to
    decide. Two threads on one core only share its vector units and its bandwidth."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit = len(cores)
    if quota.exists() and (fields := quota.read_text().split())[0] != "max":
        limit = max(1, int(fields[0]) // int(fields[1]))
    return min(len(cores), limit)
