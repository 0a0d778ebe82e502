"""The lines that only a GPU reaches, run with torch's CUDA functions replaced.

This shows that they are called as they are meant to be and that the figures come out where they
belong. It proves nothing about a GPU: that is `pytest -m gpu`.
"""

from types import SimpleNamespace

import pytest
import torch

from lcexport.engines import open_engine
from lcexport.engines.host import release
from lcexport.machine import environment
from lcexport.qualify import cold, costs, speed
from lcexport.qualify.costs import seams

CUDA = torch.device("cuda", 1)
GIB = 1 << 30


@pytest.fixture
def free(monkeypatch):
    """A GPU's free memory: each question takes the next number."""
    numbers: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (numbers.pop(0), 80 * GIB))
    return numbers


def test_a_pass_is_timed_by_events_on_the_callers_stream(monkeypatch):
    told: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            told.append(stream)

        def synchronize(self) -> None:
            told.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert speed.seconds_of(lambda: told.append("run"), CUDA) == 1.5
    assert told == ["stream of cuda:1", "run", "stream of cuda:1", "synchronize"]


def test_a_cold_start_tells_device_memory(monkeypatch, pair_bundle, free):
    free += [70 * GIB, 40 * GIB, 35 * GIB]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: GIB)

    def on_the_host(backend, bundle, resolution, device):
        return open_engine(backend, bundle, resolution, "cpu")

    monkeypatch.setattr(cold, "open_engine", on_the_host)
    got = cold.cold_start(str(pair_bundle), "64x96x9", "onnxruntime", "cuda:1")
    assert got["device_bytes_opened"] == 30 * GIB
    assert got["device_bytes_run"] == 35 * GIB
    assert got["torch_peak_bytes"] == GIB


def test_free_memory_is_the_devices(subject_of, double_bundle, free):
    free += [3 * GIB]
    assert subject_of(double_bundle, "tensorrt", "cuda:1").free_bytes() == 3 * GIB


def test_seams_cost_time_at_the_bandwidth_of_a_copy(monkeypatch, subject_of, double_bundle):
    monkeypatch.setattr(costs, "copy_bandwidth", lambda device: 1e6)
    (result,) = seams(subject_of(double_bundle, "tensorrt", "cuda:1"))
    got = {name: value for name, value in result.got.items() if isinstance(value, int | float)}
    assert got["seconds_per_pass"] == (got["bytes_written"] + got["bytes_read"]) / 1e6


def test_the_environment_names_the_gpu(monkeypatch, subject_of, double_bundle, the_double):
    properties = SimpleNamespace(name="H200", major=9, minor=0, total_memory=141 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = environment(torch.device("cuda:1"), ["tensorrt"])
    assert (found["gpu"], found["compute_capability"]) == ("H200", "9.0")
    assert found["tensorrt"] == the_double.__version__


def test_freed_memory_goes_back_to_the_device(monkeypatch):
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    release()
    assert emptied == [True]
