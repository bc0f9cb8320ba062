"""What a model runner does before its first request: kernels are compiled, steps captured.

Importing this loads Triton.
"""

from __future__ import annotations

import logging

import torch

from ....kernels.prefix_groups import MIN_MEMBERS
from ...errors import ConfigurationError, one_line
from ...step import BlockCopy
from ..backend import Rehearsal
from ..steps import DeviceStep, GraphKey, ModelOutput
from .attention import CudaPlanner
from .inputs import DeviceInputs
from .layers.adapters import CudaSlots
from .layers.kernels import Kernels
from .step_graphs import MAX_DRAFT_SIZE, Capture, NotCapturableError, StepGraphs

logger = logging.getLogger("quire.engine")


# Over 50 lines: three ways in which it may fail, each with its advice.
def capture_graphs(
    runner: Rehearsal, sizes: list[int], mixed: list[int], capture: Capture, kernels: Kernels
) -> StepGraphs | None:
    """Capture decode steps of these sizes, ascending, steps with drafts if there may be any, and
    mixed steps of so many tokens; None if the model waits for the device within a step."""
    inputs, planner = of_cuda(runner)
    adapters = _adapters_of(runner)
    query_len = planner.query_len
    draft_sizes = [
        size
        for size in sizes
        if query_len > 1 and size <= MAX_DRAFT_SIZE and size * query_len <= inputs.max_num_tokens
    ]

    def forward(step: DeviceStep, key: GraphKey, logits: torch.Tensor | None) -> ModelOutput:
        if adapters is not None:
            adapters.rehearse(active=key.adapted)
        if key.mixed:
            hidden = runner.run_mixed(step, planner.plan_mixed(step, inputs.num_decodes))
            return ModelOutput(hidden, hidden.new_empty(0))
        if key.query_len > 1:
            plan = planner.plan_drafts(step.seq_lens, query_len)
        else:
            plan = planner.plan_decodes(step.seq_lens, shared=key.shared)
        return runner.run_decodes(step, plan, logits)

    inputs.pad_decodes(sizes)
    inputs.pad_drafts(draft_sizes, query_len)
    graphs = StepGraphs(forward, inputs.step_of, capture, kernels)
    shares = planner.shared_prefixes is not None
    try:
        graphs.capture(
            sizes,
            [size for size in sizes if shares and size >= MIN_MEMBERS],
            with_adapters=adapters is not None,
            draft_sizes=draft_sizes,
            query_len=query_len,
        )
    except NotCapturableError as error:
        logger.warning("decode steps run without CUDA graphs: %s", error)
        inputs.pad_decodes([])
        inputs.pad_drafts([], 1)
        return None
    except RuntimeError as error:
        raise ConfigurationError(
            f"the CUDA graphs of decode steps cannot be captured ({one_line(error)}): lower "
            "--gpu-memory-utilization if memory ran out, else use --enforce-eager"
        ) from error
    inputs.pad_mixed(mixed)
    try:
        graphs.capture_mixed(mixed, with_adapters=adapters is not None)
    except (NotCapturableError, RuntimeError) as error:
        logger.warning("steps with prompts run without CUDA graphs: %s", one_line(error))
        inputs.pad_mixed([])
    return graphs


def compile_kernels(runner: Rehearsal) -> None:
    """Launch every kernel that a step may launch, other than the sampler's, so that no request
    waits for its compilation: decodes, prefills of short and of long rows, products of all their
    tiles, a copy of a block."""
    inputs, planner = of_cuda(runner)
    inputs.pad_decodes([1])
    step = inputs.static_step(1)
    for shared in {False, planner.shared_prefixes is not None}:
        runner.run_decodes(step, planner.plan_decodes(step.seq_lens, shared=shared))
    inputs.pad_decodes([])
    if 1 < (query_len := planner.query_len) <= inputs.max_num_tokens:
        inputs.pad_drafts([1], query_len)
        step = inputs.static_step(1, query_len)
        runner.run_decodes(step, planner.plan_drafts(step.seq_lens, query_len))
        inputs.pad_drafts([], 1)
    for num_tokens in sorted({min(size, inputs.max_num_tokens) for size in (2, 24, 48, 256)}):
        runner.run_prompts(num_tokens, 1)
    if (adapters := _adapters_of(runner)) is not None:
        adapters.rehearse(active=True)
        runner.run_prompts(2, 1)
        adapters.rehearse(active=False)
    runner.copy_blocks([BlockCopy(0, 0)])
    if runner.draft is not None:
        compile_kernels(runner.draft)


def _adapters_of(runner: Rehearsal) -> CudaSlots | None:
    adapters = runner.adapters
    assert adapters is None or isinstance(adapters, CudaSlots)
    return adapters


def of_cuda(runner: Rehearsal) -> tuple[DeviceInputs, CudaPlanner]:
    """Return what a CudaBackend has made for the runner."""
    inputs, planner = runner.inputs, runner.planner
    assert isinstance(inputs, DeviceInputs) and isinstance(planner, CudaPlanner)
    return inputs, planner
