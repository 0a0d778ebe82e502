"""As much of the runtime as the real TensorRT for RTX can do without a driver."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt.memory import driver_version, torch_dtype
from lcexport.engines.trt.product import Product, open_product
from lcexport.engines.trt.reader import PlanFile
from lcexport.engines.trt.refit import trt_dtype
from lcexport.engines.trt.runtime import TrtEngine


@pytest.fixture(scope="module")
def rtx() -> Product:
    try:
        return open_product("tensorrt-rtx")
    except IncompatibleError as error:
        pytest.skip(str(error))


@pytest.fixture
def plan(tmp_path) -> PlanFile:
    data = b"not a plan" * 100
    path = tmp_path / "a.plan"
    path.write_bytes(data)
    return PlanFile(path, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.skipif(driver_version() is not None, reason="there is a driver")
def test_a_stream_reader_without_a_driver(rtx, plan, workspace):
    with pytest.raises(IncompatibleError, match=r"cannot open the CUDA driver.*Install an NVIDIA"):
        TrtEngine(rtx, [plan], workspace)


def test_types_and_weights(rtx, make_weights):
    assert torch_dtype(rtx.trt, rtx.trt.DataType.BF16) is torch.bfloat16
    tensor = load_file(make_weights("bf16"))["blocks.0.ffn.w1.weight"]
    dtype = trt_dtype(rtx.trt, tensor.dtype)
    weights = rtx.trt.Weights(dtype, tensor.data_ptr(), tensor.numel())
    assert (weights.dtype, weights.size) == (rtx.trt.DataType.BF16, tensor.numel())
    assert weights.nbytes == tensor.nbytes
    with pytest.raises(IncompatibleError, match=r"got DataType.FP8; wanted float32, .*bool"):
        torch_dtype(rtx.trt, rtx.trt.DataType.FP8)
