"""Test that a launcher's check runs once a signature, and again for every other signature."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from quire.kernels import checks
from quire.kernels.checks import once_a_signature, require

BASE = torch.zeros(4, 6)


@pytest.fixture
def interpreting() -> Iterator[mock.Mock]:
    with mock.patch.object(checks, "interpreting", return_value=True) as found:
        yield found


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(4, 5), None, 1),
        (torch.zeros(6, 4).T, None, 1),
        (BASE.half(), None, 1),
        (BASE.to("meta"), None, 1),
        (BASE, BASE, 1),
        (BASE, None, 2),
    ],
)
def test_a_check_runs_again_for_another_signature(
    other: tuple[object, ...], interpreting: mock.Mock
) -> None:
    calls = []
    check = once_a_signature(lambda *args: calls.append(args))
    for _ in range(3):
        check(BASE.clone(), None, 1)
    assert len(calls) == 1
    for _ in range(3):
        check(*other)
    assert len(calls) == 2
    interpreting.return_value = False  # tensors of the CPU are refused now
    check(BASE, None, 1)
    assert len(calls) == 3


def test_what_failed_is_checked_again() -> None:
    check = once_a_signature(lambda tensor: require(tensor.shape[0] == 1, "one row"))
    for _ in range(2):
        with pytest.raises(ValueError, match="one row"):
            check(BASE)
    check(BASE[:1])


def test_the_memory_of_signatures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_REMEMBERED", 8)
    calls = []
    check = once_a_signature(lambda tensor, number: calls.append(number))
    for number in range(20):
        check(BASE, number)
    check(BASE, 0)
    assert calls == [*range(20), 0]
