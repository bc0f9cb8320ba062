"""Test what crosses between two clocks and between two versions of the protocol."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.process import wire
from quire.engine.process.engine_handle import EngineHandle, EngineLink
from quire.engine.process.process_client import ProcessEngineClient

from .. import fakes
from ..fakes import make_request


@pytest.mark.parametrize("deadlines", [(None, None), (130.0, 400.0)])
def test_times_are_those_of_the_receiver(deadlines: tuple[float | None, float | None]) -> None:
    """The sender's clock shows 110, and the receiver's 7 when the message arrives."""
    queue, total = deadlines
    request = replace(make_request(), arrival_time=100.0, queue_deadline=queue, deadline=total)
    message = wire.decode_to_engine(wire.encode(wire.Add.sent(request, 110.0)))
    assert isinstance(message, wire.Add)
    received = message.received(7.0)
    assert received.arrival_time == -3.0
    assert (received.queue_deadline, received.deadline) == (queue and 27.0, total and 297.0)
    assert received.shifted(103.0) == request


def test_delivered_tokens_cross() -> None:
    request = replace(make_request(n=3), resume=((1, 2), None, ()), on_trial=True)
    message = wire.decode_to_engine(wire.encode(wire.Add.sent(request, 0.0)))
    assert isinstance(message, wire.Add)
    assert message.request == request and message.request.open_choices == [0, 2]


def test_a_resume_that_makes_no_sense_is_a_malformed_message() -> None:
    request = replace(make_request(n=2), resume=((1,), (2,)))
    data = wire.encode(wire.Add.sent(request, 0.0))
    with pytest.raises(wire.MalformedMessageError):
        wire.decode_to_engine(data.replace(b"\x92\x91\x01\x91\x02", b"\x93\x91\x01\x91\x02\xc0"))


async def test_a_client_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setattr(EngineHandle, "hide_socket", lambda self: None)
    client = ProcessEngineClient(EngineConfig(model="fake"), core="fakes:build_core")
    await client.start()
    await client.wait_ready()
    try:
        assert client._engine is not None
        monkeypatch.setattr(wire, "PROTOCOL", wire.PROTOCOL + 1)
        stranger = EngineLink(client._engine.address)
        answer = await asyncio.wait_for(stranger.receive(), 10)
        assert isinstance(answer, wire.StartFailed) and "protocol" in answer.message
        stranger.close()
        assert client.health().ready
    finally:
        await client.close()
