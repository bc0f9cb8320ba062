"""What a key may use in a minute, counted by several processes in one memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.tenants.rate_headers import _reset
from quire.server.tenants.rates import MINUTE, Rates, Use, rates_size


class Clock:
    def __init__(self) -> None:
        self.time = 600.0

    def __call__(self) -> float:
        return self.time


def two_processes(clock: Clock) -> tuple[Rates, Rates]:
    memory = memoryview(bytearray(rates_size(2))).cast("q")
    return Rates(memory, 0, clock), Rates(memory, 1, clock)


def test_processes_add_up_and_minutes_pass() -> None:
    clock = Clock()
    first, second = two_processes(clock)
    first.add_tokens(3, 100)
    second.add_tokens(3, 50)
    second.add_request(3)
    assert first.tokens(3) == second.tokens(3) == (150, 0, 0.0)
    assert first.requests(3).now == 1 and first.tokens(4).now == 0
    clock.time += 90  # half a minute into the next one
    assert first.tokens(3) == (0, 150, 30.0)
    assert first.tokens(3).last_minute == 75
    second.add_tokens(3, 10)  # one of them has moved on, the other not yet
    assert first.tokens(3) == (10, 150, 30.0)
    clock.time += 60
    assert first.tokens(3) == (0, 10, 30.0)
    clock.time += 60
    assert first.tokens(3).last_minute == 0
    first.add_tokens(3, 5)
    assert second.tokens(3) == (5, 0, 30.0)


def test_tokens_are_given_back_and_dead_processes_run_nothing() -> None:
    clock = Clock()
    first, second = two_processes(clock)
    first.add_tokens(1, 10)
    first.add_tokens(1, -4)
    assert second.tokens(1).now == 6
    clock.time += 60
    first.add_tokens(1, -4)  # of the minute before: nothing becomes negative
    assert second.tokens(1) == (0, 6, 0.0)
    first.add_running(1, 1)
    second.add_running(1, 2)
    assert first.running(1) == 3
    first.add_waiting(5, 3)
    second.add_waiting(5, 1)
    second.add_waiting(4000, 2)
    assert first.waiting(5) == 4 and first.slots_waiting() == {5, 4000}
    second.forget_running(0)
    assert first.running(1) == 2 and second.running(2) == 0
    second.add_waiting(5, -1)
    assert first.slots_waiting() == {4000}


@settings(max_examples=300, deadline=None)
@given(
    now=st.integers(0, 200),
    before=st.integers(0, 200),
    elapsed=st.floats(0, 59.9),
    needed=st.integers(1, 300),
    limit=st.integers(1, 200),
)
def test_the_wait_is_as_long_as_needed_and_no_longer(
    now: int, before: int, elapsed: float, needed: int, limit: int
) -> None:
    """The oracle moves time on and asks again."""
    use = Use(now, before, elapsed)

    def fits(seconds: float) -> bool:
        later = elapsed + seconds
        minutes, rest = divmod(later, MINUTE)
        moved = {0: Use(now, before, rest), 1: Use(0, now, rest)}.get(int(minutes), Use(0, 0, rest))
        return moved.last_minute + min(needed, limit) <= limit + 1e-5

    wait = use.wait(needed, limit)
    assert 0 <= wait <= 2 * MINUTE
    assert fits(wait + 1e-6)
    if wait > 0.01:
        assert not fits(wait - 0.01)
    assert (wait == 0) == (use.left(limit) >= min(needed, limit))
    if needed >= limit and wait:  # the whole limit is free only when all is forgotten
        assert wait == pytest.approx(use.reset())


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (Use(0, 0, 5.0), "0s"),
        (Use(0, 3, 47.5), "12.5s"),
        (Use(3, 0, 57.5), "1m2.5s"),
        (Use(3, 3, 0.0), "2m0s"),
    ],
)
def test_resets_are_written_as_openai_writes_them(use: Use, text: str) -> None:
    assert _reset(use, anthropic=False) == text
