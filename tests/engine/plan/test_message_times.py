"""Test that messages are measured over a socket, with requests that run to their ends."""

from __future__ import annotations

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.plan.message_times import measure_messages
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams

from ..fleet.local_engine import LoadedWorker


def test_each_request_is_read_and_each_step_answered() -> None:
    core = EngineCore(
        EngineConfig(model="none", speculation="off"), LoadedWorker(num_blocks=60, block_size=16)
    )
    requests = [
        Request(
            request_id=str(number),
            prompt_token_ids=tuple(range(3, 20)),
            sampling_params=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
            arrival_time=0.0,
        )
        for number in range(6)
    ]
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        return 0.001 * calls

    found = measure_messages(core, requests, clock)
    # Two readings of the clock for each request, and two for each of its four steps.
    assert calls == 6 * (2 + 4 * 2) and not core.has_work
    assert abs(found.step - 0.001) < 1e-9 and abs(found.request - 0.001) < 1e-9
