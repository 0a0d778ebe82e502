"""Where a component is, and how often it is loaded, under each policy."""

import pytest
import torch

from lcexport.runtime.residency import Resident


class FakeComponent:
    def __init__(self, log: list[str], device: torch.device) -> None:
        self.log = log
        log.append(f"load {device}")

    def to(self, device: torch.device | str) -> None:
        self.log.append(f"to {device}")

    def close(self) -> None:
        self.log.append("close")


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("keep", ["load meta", "use", "use", "close"]),
        ("cpu", ["load cpu", *["to meta", "use", "to cpu"] * 2, "close"]),
        ("release", ["load meta", "use", "close"] * 2),
    ],
)
def test_policies(offload, expected):
    log: list[str] = []
    resident = Resident(lambda where: FakeComponent(log, where), torch.device("meta"), offload)
    for _ in range(2):
        with resident.on_device():
            log.append("use")
    resident.close()
    resident.close()
    assert log == expected


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("keep", ["load meta", "inner", "outer"]),
        ("cpu", ["load cpu", "to meta", "inner", "outer", "to cpu"]),
        ("release", ["load meta", "inner", "outer", "close"]),
    ],
)
def test_what_is_lent_twice_goes_back_when_its_last_user_is_done(offload, expected):
    log: list[str] = []
    resident = Resident(lambda where: FakeComponent(log, where), torch.device("meta"), offload)
    with resident.on_device() as outer:
        with resident.on_device() as inner:
            assert inner is outer
            log.append("inner")
        log.append("outer")
    assert log == expected


def test_what_is_closed_while_it_is_lent_does_not_come_back():
    log: list[str] = []
    resident = Resident(lambda where: FakeComponent(log, where), torch.device("meta"), "cpu")
    with resident.on_device():
        resident.close()
    assert log[-1] == "close"


def test_an_error_during_use_still_moves_it_back():
    log: list[str] = []
    resident = Resident(lambda where: FakeComponent(log, where), torch.device("meta"), "cpu")
    with pytest.raises(RuntimeError), resident.on_device():
        raise RuntimeError
    assert log == ["load cpu", "to meta", "to cpu"]
