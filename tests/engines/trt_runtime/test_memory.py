"""Where tensors lie in the shared block."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(("asked", "found"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1")])
def test_a_device_has_a_number_as_its_tensors_have(monkeypatch, asked, found):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    ops = CudaOps(torch.device(asked))
    assert (ops.device, ops.stream) == (torch.device(found), 7)
