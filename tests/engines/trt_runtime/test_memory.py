"""Where tensors lie in the shared block."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcexport.configs.errors import LcexportError
from lcexport.engines.trt import memory
from lcexport.engines.trt.memory import (
    ALIGNMENT,
    CudaOps,
    Lifetime,
    gpu_of,
    missing_gpu,
    place,
    torch_dtype,
)

LIFETIMES = st.builds(
    lambda nbytes, first, length: Lifetime(nbytes, first, first + length),
    st.integers(0, 5000),
    st.integers(0, 6),
    st.integers(0, 6),
)


@given(st.dictionaries(st.text(max_size=3), LIFETIMES, max_size=12))
def test_tensors_alive_at_once_do_not_overlap(lifetimes):
    offsets, total = place(lifetimes)
    assert set(offsets) == set(lifetimes)
    for name, one in lifetimes.items():
        assert offsets[name] % ALIGNMENT == 0
        assert offsets[name] + one.nbytes <= total
        for other, two in lifetimes.items():
            apart = (
                offsets[name] + one.nbytes <= offsets[other]
                or offsets[other] + two.nbytes <= offsets[name]
            )
            assert name == other or apart or not one.meets(two)


def test_a_chain_needs_two_places():
    """x is read by the segment that makes the next x: two are alive at once, never three."""
    chain = {f"x{step}": Lifetime(1000, step, step + 1) for step in range(8)}
    shared = {"text": Lifetime(512, 0, 8)}
    _, total = place(chain | shared)
    assert total == 2 * 1024 + 512


def test_types(double):
    for name, wanted in (("FLOAT", torch.float32), ("BF16", torch.bfloat16), ("BOOL", torch.bool)):
        assert torch_dtype(double, getattr(double.DataType, name)) is wanted


@pytest.mark.parametrize(
    ("sees", "built_for", "driver", "missing"),
    [
        (True, "13.0", "13.0", None),
        (False, "13.0", None, "no NVIDIA driver (libcuda.so.1)"),
        (False, None, "13.0", f"a torch without CUDA ({torch.__version__})"),
        (False, "13.0", "12.4", "no GPU that torch's CUDA 13.0 can use with the driver's 12.4"),
    ],
)
def test_what_stands_between_torch_and_a_gpu(monkeypatch, sees, built_for, driver, missing):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(memory, "driver_version", lambda: driver)
    assert missing_gpu() == missing


def test_a_child_process_is_told_the_gpus_own_name(monkeypatch):
    properties = {0: SimpleNamespace(uuid="aa"), 1: SimpleNamespace(uuid="bb")}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: properties[device.index]
    )
    assert gpu_of(torch.device("cuda:1")) == "GPU-bb"
    assert gpu_of(torch.device("cpu")) is None


def test_a_child_process_is_told_the_part_of_a_gpu_that_this_one_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aa, MIG-bb")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert gpu_of(torch.device("cuda:1")) == "MIG-bb"
    assert gpu_of(torch.device("cuda")) == "MIG-aa"


class FakeRecording:
    """`torch.cuda.graph` on the host: its stream is current inside; ending it may fail."""

    current: ClassVar[list[str]] = ["the caller's"]
    ends_with: ClassVar[Exception | None] = None
    modes: ClassVar[list[str]] = []

    def __init__(self, graph, *, stream, capture_error_mode):
        self.modes.append(capture_error_mode)

    def __enter__(self):
        self.current[0] = "the recording's"

    def __exit__(self, *_):
        if self.ends_with is not None:
            raise self.ends_with  # as capture_end does, before the stream is put back
        self.current[0] = "the caller's"


@contextmanager
def stream_of(stream):
    """`torch.cuda.stream`: puts back what was current."""
    before = FakeRecording.current[0]
    try:
        yield
    finally:
        FakeRecording.current[0] = before


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", stream_of)
    monkeypatch.setattr(torch.cuda, "graph", FakeRecording)
    return CudaOps(torch.device("cuda:0"))


@pytest.mark.parametrize("end", [None, RuntimeError("capture was invalidated")])
def test_a_recording_that_fails_raises_its_own_error_and_leaves_the_stream(
    recorder, monkeypatch, end
):
    monkeypatch.setattr(FakeRecording, "ends_with", end)
    ours = LcexportError("TensorRT refused")

    def refuse():
        assert FakeRecording.current == ["the recording's"]
        raise ours

    with pytest.raises(LcexportError) as caught:
        recorder.capture(refuse)
    assert caught.value is ours
    assert FakeRecording.current == ["the caller's"]
    assert FakeRecording.modes[-1] == "thread_local"


def test_a_recording_that_cannot_be_ended_says_so(recorder, monkeypatch):
    end = RuntimeError("capture was invalidated")
    monkeypatch.setattr(FakeRecording, "ends_with", end)
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.capture(lambda: None)


def test_torch_has_the_mode_that_is_asked_for():
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters


@pytest.mark.parametrize(("asked", "found"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1")])
def test_a_device_has_a_number_as_its_tensors_have(monkeypatch, asked, found):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    ops = CudaOps(torch.device(asked))
    assert (ops.device, ops.stream) == (torch.device(found), 7)
