"""Test copies to the host and their order, with a stand-in for torch's streams and events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quire.kernels import device_copy
from quire.kernels.device_copy import Downloads


class FakeStreams:
    """Record what happens in which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.active = "main"
        make = torch.empty
        monkeypatch.setattr(device_copy, "_has_own_memory", lambda device: True)
        monkeypatch.setattr(device_copy, "_copy_stream", lambda device: Stream("side", self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream(self.active, self))
        monkeypatch.setattr(torch.cuda, "stream", self.enter)
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(
            torch, "empty", lambda *args, pin_memory=False, **kw: self.pinned(make(*args, **kw))
        )
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda _, stream: self.log.append(f"held {stream.name}")
        )

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            self.log.append(f"copy of {tensor.nbytes} in {self.active}")
        return tensor

    @contextlib.contextmanager
    def enter(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream.name
        yield
        self.active = before


class Stream:
    def __init__(self, name: str, streams: FakeStreams) -> None:
        self.name, self._streams = name, streams

    def wait_stream(self, other: Any) -> None:
        self._streams.log.append(f"{self.name} after {other.name}")

    def wait_event(self, event: Any) -> None:
        self._streams.log.append(f"{self.name} after the event of {event.of}")


class Event:
    def __init__(self, streams: FakeStreams) -> None:
        self.of, self._streams = "", streams

    def record(self, stream: Stream) -> None:
        self.of = stream.name

    def synchronize(self) -> None:
        self._streams.log.append(f"host after the event of {self.of}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    return FakeStreams(monkeypatch)


def test_copies_wait_for_what_was_launched_and_nothing_waits_for_them(
    streams: FakeStreams,
) -> None:
    downloads = Downloads()
    large = torch.arange(5000.0)
    streams.log.clear()
    found = downloads.add(large)
    downloads.end()
    assert streams.log[0] == "side after main" and streams.log[-1] == "held side"
    assert torch.equal(found, large) and found.data_ptr() != large.data_ptr()
    streams.log.clear()
    downloads.hold_stream()
    downloads.wait()
    assert streams.log == ["main after the event of side", "host after the event of side"]


def test_results_in_one_piece_of_memory_are_copied_together(streams: FakeStreams) -> None:
    memory = torch.zeros(9 * 4, dtype=torch.uint8)
    ids, finite = memory[:32].view(torch.int64), memory[32:].view(torch.bool)
    ids[:] = torch.tensor([7, 1 << 40, 0, 3])
    finite[::2] = True
    downloads = Downloads()
    streams.log.clear()
    found = downloads.add(ids[:3]), downloads.add(finite[1:])
    assert streams.log.count("held side") == 1
    memory.fill_(0)  # the next step's results
    assert found[0].tolist() == [7, 1 << 40, 0] and found[1].tolist() == [False, True, False]
    assert found[0].dtype == torch.int64 and found[1].dtype == torch.bool
    assert downloads.add(torch.zeros(0)).tolist() == []


def test_tensors_of_the_host_are_returned_as_they_are() -> None:
    downloads, tensor = Downloads(), torch.ones(2)
    assert downloads.add(tensor) is tensor
    downloads.end()
    downloads.hold_stream()
    downloads.wait()
