"""Which GPUs the backends take."""

import pytest
import torch

from lcexport.configs.errors import IncompatibleError
from lcexport.engines import require_backend
from lcexport.engines.trt import backend
from lcexport.engines.trt.options import TF32_OVERRIDE
from lcexport.engines.trt.product import Product
from lcexport.engines.trt.reader import Here


@pytest.mark.parametrize(("capability", "runs"), [("sm75", False), ("sm90", False), ("sm89", True)])
def test_an_rtx_gpu_is_one_that_plans_are_compiled_for(
    rtx: Product, monkeypatch: pytest.MonkeyPatch, capability, runs
):
    here = Here("tensorrt-rtx", "1.7", "linux-x86_64", capability, "a GPU", "13.0")
    monkeypatch.setattr(backend, "read_here", lambda product, device: here)
    device = torch.device("cuda")
    if runs:
        backend.require("tensorrt-rtx", "bf16", device)
        return
    match = f"got a GPU, {capability}; wanted one of sm80, sm86, sm89, sm120, sm121"
    with pytest.raises(IncompatibleError, match=match):
        backend.require("tensorrt-rtx", "bf16", device)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime-tensorrt-rtx"])
@pytest.mark.usefixtures("rtx")
def test_no_plan_runs_in_a_process_that_asks_for_tf32(monkeypatch: pytest.MonkeyPatch, backend):
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    with pytest.raises(IncompatibleError, match=f"unset {TF32_OVERRIDE}"):
        require_backend(backend, "bf16", "cuda")
    if backend == "tensorrt-rtx":
        require_backend(backend, "bf16", "cpu")  # compiled in processes that have no such variable
