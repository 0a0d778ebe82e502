"""The rules that the double holds its callers to, each broken once."""

from typing import Any

import fake_tensorrt as trt
import onnx
import pytest
import torch

MODEL = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 23]>
    half (float[4] x) => (float[4] y) <float w = {0.5}> { y = Mul (x, w) }
""")
USER_MANAGED = trt.ExecutionContextAllocationStrategy.USER_MANAGED


@pytest.fixture(autouse=True)
def _fresh():
    trt.reset()
    yield
    trt.reset()


@pytest.fixture
def runtime():
    return trt.Runtime(trt.Logger())


@pytest.fixture
def engine(runtime) -> Any:
    return runtime.deserialize_cuda_engine(trt.plan_bytes(MODEL, streamable=1 << 20))


@pytest.fixture
def ready(engine) -> Any:
    """A context with all that it needs, its tensors, and a stream."""
    context = engine.create_execution_context(USER_MANAGED)
    ops = trt.HostOps()
    block, x, y = ops.allocate(1 << 17), torch.arange(4.0), torch.zeros(4)
    context.set_device_memory(block.data_ptr(), block.numel())
    assert context.set_tensor_address("x", x.data_ptr())
    assert context.set_tensor_address("y", y.data_ptr())
    context.kept = (block, x, y, ops)
    return context


def test_it_computes(ready):
    _, x, y, ops = ready.kept
    assert ready.execute_async_v3(ops.stream)
    assert torch.equal(y, x / 2)


def test_a_budget_after_a_context(engine):
    engine.weight_streaming_budget_v2 = 5
    context = engine.create_execution_context(USER_MANAGED)
    engine.weight_streaming_budget_v2 = 7
    assert engine.weight_streaming_budget_v2 == 5
    assert "after a context" in trt.messages[-1]
    del context


def test_an_address_that_is_not_set(engine):
    context, ops = engine.create_execution_context(), trt.HostOps()
    assert not context.set_tensor_address("z", 1)
    assert not context.set_tensor_address("x", 0)
    assert not context.execute_async_v3(ops.stream)
    assert "no address set for x, y" in trt.messages[-1]


@pytest.mark.parametrize(("shift", "nbytes"), [(1, 1 << 17), (0, 1 << 8)])
def test_device_memory_unaligned_or_too_small(engine, shift, nbytes):
    context, ops = engine.create_execution_context(USER_MANAGED), trt.HostOps()
    context.set_device_memory(ops.allocate(1 << 17).data_ptr() + shift, nbytes)
    assert "device memory refused" in trt.messages[-1]
    for name in ("x", "y"):
        context.set_tensor_address(name, torch.zeros(4).data_ptr())
    assert not context.execute_async_v3(ops.stream)
    assert "no device memory was set" in trt.messages[-1]


def test_a_stream_that_is_none(ready):
    with pytest.raises(RuntimeError, match="illegal stream handle"):
        ready.execute_async_v3(0)


def test_shapes(ready):
    assert ready.set_input_shape("x", (4,))
    assert not ready.set_input_shape("x", (5,))
    assert not ready.set_input_shape("y", (4,))
    with pytest.raises(TypeError):
        ready.set_input_shape("x", 4)


def test_a_capture_without_a_run_before_it(ready):
    *_, ops = ready.kept
    done: list[bool] = []
    ops.capture(lambda: done.append(ready.execute_async_v3(ops.stream)))
    assert done == [False]
    assert ready.execute_async_v3(ops.stream)
    ops.capture(lambda: done.append(ready.execute_async_v3(ops.stream)))
    assert done == [False, True]


def test_a_capture_of_what_allocates(runtime):
    engine: Any = runtime.deserialize_cuda_engine(trt.plan_bytes(MODEL, allocates=True))
    context, ops = engine.create_execution_context(), trt.HostOps()
    x, y = torch.zeros(4), torch.zeros(4)
    assert context.set_tensor_address("x", x.data_ptr())
    assert context.set_tensor_address("y", y.data_ptr())
    assert context.execute_async_v3(ops.stream)
    assert not context.is_stream_capturable(ops.stream)
    done: list[bool] = []
    ops.capture(lambda: done.append(context.execute_async_v3(ops.stream)))
    assert done == [False]
    with pytest.raises(RuntimeError, match="illegal stream handle"):
        context.is_stream_capturable(0)


def test_weights_that_are_streamed_into_memory_of_ours(runtime):
    plan = trt.plan_bytes(MODEL, allocates=True, streamable=1 << 20)
    engine: Any = runtime.deserialize_cuda_engine(plan)
    assert engine.create_execution_context(USER_MANAGED) is None
    assert engine.create_execution_context() is not None


def test_an_engine_after_its_runtime():
    engine: Any = trt.Runtime(trt.Logger()).deserialize_cuda_engine(trt.plan_bytes(MODEL))
    with pytest.raises(RuntimeError, match="ICudaEngine is used after its Runtime was destroyed"):
        _ = engine.num_io_tensors


def test_a_context_after_its_engine(runtime):
    engine: Any = runtime.deserialize_cuda_engine(trt.plan_bytes(MODEL))
    context = engine.create_execution_context()
    del engine
    with pytest.raises(RuntimeError, match="IExecutionContext is used after its ICudaEngine"):
        context.infer_shapes()


@pytest.mark.parametrize("change", [lambda data: data[:-5], lambda data: b"x" + data[1:]])
def test_a_damaged_plan(runtime, change):
    assert runtime.deserialize_cuda_engine(change(trt.plan_bytes(MODEL))) is None


def test_engines_and_contexts_are_not_made_by_hand():
    for cls in (trt.ICudaEngine, trt.IExecutionContext):
        with pytest.raises(TypeError, match="No constructor defined"):
            cls()


def test_it_says_what_it_is(runtime, capfd):
    trt.Runtime(trt.Logger())
    assert "TEST DOUBLE" in capfd.readouterr().err
