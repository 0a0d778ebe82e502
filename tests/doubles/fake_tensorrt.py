"""A test double of the `tensorrt` module's runtime side. It is NOT TensorRT, and says so.

A "plan" is a small container around an ONNX model; running one computes the model on the host
(float32 by ONNX Runtime, bfloat16 by the ONNX reference evaluator), reading and writing raw
addresses as TensorRT does. What callers must get right is enforced as the real one does or more
strictly: types of arguments, None and False on failure, the weight budget only before a context,
every address set, alignment, warm-up before a capture, and which objects must outlive others.
Scratch memory is overwritten in every run, so that tensors that overlap it are noticed.

What has a real name here has the real signature: `test_fake_tensorrt.py` checks it. What has
not: `failures`, `messages`, `destroyed`, `reset`, `module`, `plan_bytes`, `HostOps`.
"""

import ctypes
import json
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import wraps
from types import ModuleType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

__version__ = "11.4.0.106"
IS_A_DOUBLE = "this is a TEST DOUBLE of TensorRT: nothing was compiled, no GPU is used"

MAGIC = b"FAKETRT1"
STREAMING_SCRATCH = 4096

failures: set[str] = set()
"""Calls that fail when they are made next: "ICudaEngine.create_execution_context", or with an
argument, "IExecutionContext.set_tensor_address:velocity"."""
messages: list[str] = []
"""Everything logged."""
destroyed: list[str] = []
"""Class names in the order in which objects ceased to be."""

logging.getLogger(__name__).warning(IS_A_DOUBLE)


def reset() -> None:
    """Forget failures, messages and history."""
    failures.clear()
    messages.clear()
    destroyed.clear()


def module(version: str = __version__) -> ModuleType:
    """The double as a module of its own, of another version."""
    made = ModuleType("fake_tensorrt_" + version.replace(".", "_"))
    made.__dict__.update({k: v for k, v in globals().items() if not k.startswith("_")})
    made.__dict__["__version__"] = version
    return made


# Arguments, as pybind11 takes them


def signatures(*overloads: tuple[str, ...]) -> Callable[[Callable], Callable]:
    """Give a method overloads, each a tuple of parameter names ("name=" has a default)."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            for overload in overloads:
                names = [name.rstrip("=") for name in overload]
                if len(args) > len(names):
                    continue
                given = dict(zip(names, args, strict=False))
                needed = {name for name in overload if not name.endswith("=")}
                if set(given) & set(kwargs) or not set(kwargs) <= set(names):
                    continue
                if needed <= set(given | kwargs):
                    result = function(self, **given, **kwargs)
                    if result is not NotImplemented:
                        return result
            raise TypeError(f"{function.__name__}(): incompatible function arguments: {args}")

        method.overloads = overloads  # pyright: ignore[reportAttributeAccessIssue]
        return method

    return decorate


def need(value: Any, *kinds: type) -> Any:
    """The TypeError that pybind11 raises for an argument of another type."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"incompatible function arguments: {value!r} is a {type(value).__name__}")
    return value


def fails(call: str, argument: str = "") -> bool:
    """Whether a test asked this call to fail."""
    for name in (call, f"{call}:{argument}"):
        if name in failures:
            messages.append(f"{name}: failure injected")
            return True
    return False


def track(thing: object) -> None:
    weakref.finalize(thing, destroyed.append, type(thing).__name__)


def alive(reference: Callable[[], Any], owner: str, user: str) -> Any:
    """What `reference` points at; the real library would read freed memory."""
    found = reference()
    if found is None:
        raise RuntimeError(f"a {user} is used after its {owner} was destroyed")
    return found


# Enumerations and plain values


class Valued(Enum):
    def __int__(self) -> int:
        return self.value


class DataType(Valued):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8 = 0, 1, 2, 3, 4, 5
    FP8, BF16, INT64, INT4, FP4, E8M0 = 6, 7, 8, 9, 10, 11


class TensorIOMode(Valued):
    NONE, INPUT, OUTPUT = 0, 1, 2


class TensorLocation(Valued):
    DEVICE, HOST = 0, 1


class SeekPosition(Valued):
    SET, CUR, END = 0, 1, 2


class ExecutionContextAllocationStrategy(Valued):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class ProfilingVerbosity(Valued):
    LAYER_NAMES_ONLY, NONE, DETAILED = 0, 1, 2


class LayerInformationFormat(Valued):
    ONELINE, JSON = 0, 1


class Severity(Valued):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = 0, 1, 2, 3, 4


NUMPY = {
    DataType.FLOAT: np.dtype(np.float32),
    DataType.HALF: np.dtype(np.float16),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
    DataType.INT8: np.dtype(np.int8),
    DataType.INT32: np.dtype(np.int32),
    DataType.INT64: np.dtype(np.int64),
    DataType.BOOL: np.dtype(np.bool_),
}
FROM_ONNX = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.BFLOAT16: DataType.BF16,
    TensorProto.INT8: DataType.INT8,
    TensorProto.INT32: DataType.INT32,
    TensorProto.INT64: DataType.INT64,
    TensorProto.BOOL: DataType.BOOL,
}


class Dims(tuple):
    """A shape."""

    MAX_DIMS: ClassVar[int] = 8


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            sys.stderr.write(f"[TRT double] [{severity.name[0]}] {msg}\n")


def say(logger: ILogger, message: str, severity: Severity = Severity.ERROR) -> None:
    messages.append(message)
    logger.log(severity, message)


class Weights:
    """A type, an address and a count; or an array that is kept."""

    @signatures(("type=",), ("type", "ptr", "count"), ("a",))
    def __init__(self, type: Any = DataType.FLOAT, ptr: int = 0, count: int = 0, a: Any = None):
        if isinstance(type, np.ndarray):
            return NotImplemented  # pyright: ignore[reportReturnType]
        if a is not None:
            kinds = {kind: name for name, kind in NUMPY.items()}
            self._kept = np.ascontiguousarray(a)
            type, ptr, count = kinds[a.dtype], self._kept.ctypes.data, a.size
        self._dtype = need(type, DataType)
        self._ptr, self._count = need(ptr, int), need(count, int)
        return None

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def size(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._count * NUMPY[self._dtype].itemsize

    def numpy(self) -> np.ndarray:
        return host_array(self._ptr, NUMPY[self._dtype], (self._count,))


def host_array(address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The memory at an address, as an array."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = (ctypes.c_char * nbytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=dtype).reshape(shape)


# Plans


def plan_bytes(
    model: onnx.ModelProto,
    *,
    version: str = __version__,
    scratch: int = 1 << 16,
    streamable: int = 0,
    refittable: bool = False,
    stripped: bool = False,
    allocates: bool = False,
) -> bytes:
    """The double's "plan" of a model whose initialisers are inside it.

    `allocates`: it was built by TensorRT for RTX without REQUIRE_USER_ALLOCATION.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if stripped:
        for tensor in copy.graph.initializer:
            tensor.ClearField("raw_data")
    header = json.dumps(
        {
            "version": version,
            "scratch": scratch,
            "streamable": streamable,
            "refittable": refittable or stripped,
            "stripped": stripped,
            "allocates": allocates,
        }
    ).encode()
    content = copy.SerializeToString()
    lengths = len(header).to_bytes(8, "little") + len(content).to_bytes(8, "little")
    return MAGIC + lengths + header + content


class IStreamReaderV2:
    """Subclasses have `read(num_bytes, stream) -> bytes`; the binding's own differs."""

    def __init__(self) -> None:
        if fails("IStreamReaderV2.__init__"):
            raise RuntimeError("[ERROR] Failed to open cuda driver.")
        self._initialised = True

    def read(self, destination: Any, num_bytes: int, stream: int) -> int:
        raise NotImplementedError

    def seek(self, offset: int, where: SeekPosition) -> bool:
        raise NotImplementedError


class Stream:
    """Reads as the library does: asks again after a short read, gives up after an empty one."""

    def __init__(self, reader: Any) -> None:
        if not hasattr(reader, "_initialised"):
            raise TypeError("IStreamReaderV2.__init__() was not called")
        self._reader = reader

    def take(self, nbytes: int) -> bytes:
        parts = []
        while nbytes:
            try:
                part = bytes(self._reader.read(nbytes, 0))
            except Exception as error:  # swallowed: that is what the binding does
                messages.append(f"exception in a callback: {error}")
                part = b""
            if not part or len(part) > nbytes:
                raise EOFError
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)

    def seek(self, offset: int, where: SeekPosition) -> None:
        if not self._reader.seek(offset, where):
            raise EOFError


class Buffer:
    def __init__(self, data: Any) -> None:
        self._data, self._at = memoryview(data).cast("B"), 0

    def take(self, nbytes: int) -> bytes:
        part = bytes(self._data[self._at : self._at + nbytes])
        if len(part) < nbytes:
            raise EOFError
        self._at += nbytes
        return part

    def seek(self, offset: int, where: SeekPosition) -> None:
        self._at = {SeekPosition.SET: 0, SeekPosition.CUR: self._at}[where] + offset


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        if fails("Runtime.__init__"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = need(logger, ILogger)
        self.engine_host_code_allowed = False
        self.max_threads = 1
        track(self)
        say(self._logger, IS_A_DOUBLE, Severity.WARNING)

    @property
    def logger(self) -> ILogger:
        return self._logger

    @signatures(("serialized_engine",), ("stream_reader_v2",))
    def deserialize_cuda_engine(
        self, serialized_engine: Any = None, stream_reader_v2: Any = None
    ) -> "ICudaEngine | None":
        if fails("Runtime.deserialize_cuda_engine"):
            return None
        given = stream_reader_v2 if serialized_engine is None else serialized_engine
        stream = Stream(given) if isinstance(given, IStreamReaderV2) else Buffer(given)
        try:
            return self._read(stream)
        except (EOFError, ValueError) as error:
            say(self._logger, f"the plan cannot be read: {error!r}")
            return None

    def _read(self, stream: Any) -> "ICudaEngine | None":
        if stream.take(len(MAGIC)) != MAGIC:
            raise ValueError("magic tag does not match")
        stream.seek(0, SeekPosition.SET)
        start = stream.take(len(MAGIC) + 16)
        header = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
        content = int.from_bytes(start[len(MAGIC) + 8 :], "little")
        settings = json.loads(stream.take(header))
        model = onnx.ModelProto.FromString(stream.take(content))
        return ICudaEngine(SECRET, self, model, settings)


SECRET = object()  # engines and contexts are made by TensorRT, never by its users


class ICudaEngine:
    def __init__(self, *made: Any) -> None:
        if not made or made[0] is not SECRET:
            raise TypeError("ICudaEngine: No constructor defined!")
        _, runtime, model, settings = made
        self._runtime = weakref.ref(runtime)
        self._logger: ILogger = runtime.logger
        self._model: onnx.ModelProto = model
        self._settings: dict[str, Any] = settings
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._missing = set(self._weights) if settings["stripped"] else set()
        self._budget: int = settings["streamable"]
        self._contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self._compute: Callable[[dict[str, np.ndarray]], list[np.ndarray]] | None = None
        self._ports = {value.name: (TensorIOMode.INPUT, value) for value in model.graph.input}
        self._ports |= {value.name: (TensorIOMode.OUTPUT, value) for value in model.graph.output}
        track(self)

    def _check(self) -> None:
        alive(self._runtime, "Runtime", "ICudaEngine")

    def _port(self, name: str) -> tuple[TensorIOMode, Any]:
        self._check()
        return self._ports.get(need(name, str), (TensorIOMode.NONE, None))

    @property
    def num_io_tensors(self) -> int:
        self._check()
        return len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        self._check()
        return list(self._ports)[need(index, int)]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._port(name)[0]

    def get_tensor_dtype(self, name: str) -> DataType:
        _, value = self._port(name)
        return FROM_ONNX[value.type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> Dims:
        _, value = self._port(name)
        sizes = value.type.tensor_type.shape.dim
        return Dims(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)

    def get_tensor_location(self, name: str) -> TensorLocation:
        self._port(name)
        wanted = fails("ICudaEngine.get_tensor_location", name)
        return TensorLocation.HOST if wanted else TensorLocation.DEVICE

    @property
    def refittable(self) -> bool:
        return self._settings["refittable"]

    @property
    def streamable_weights_size(self) -> int:
        return self._settings["streamable"]

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self._contexts:
            say(self._logger, "the weight-streaming budget is set after a context was made")
        elif need(budget, int) < 0 or fails("ICudaEngine.weight_streaming_budget_v2"):
            say(self._logger, "weight-streaming budget refused")
        else:
            self._budget = min(budget, self.streamable_weights_size)

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return STREAMING_SCRATCH if self._budget < self.streamable_weights_size else 0

    @property
    def device_memory_size_v2(self) -> int:
        self._check()
        return self._settings["scratch"] + self.weight_streaming_scratch_memory_size

    @signatures(("strategy=",), ("runtime_config=",))
    def create_execution_context(
        self,
        strategy: Any = ExecutionContextAllocationStrategy.STATIC,
        runtime_config: Any = None,
    ) -> "IExecutionContext | None":
        self._check()
        need(strategy, ExecutionContextAllocationStrategy)
        if fails("ICudaEngine.create_execution_context"):
            return None
        managed = strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        if managed and self._settings["allocates"] and self.streamable_weights_size:
            say(self._logger, "weight streaming conflicts with user-managed allocation")
            return None
        context = IExecutionContext(SECRET, self, strategy)
        self._contexts.add(context)
        return context

    def create_engine_inspector(self) -> "EngineInspector":
        self._check()
        return EngineInspector(SECRET, self)

    def _run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._compute is None:
            self._compute = executor(self._model)
        return self._compute(feeds)

    def _refit(self, new: dict[str, Weights]) -> None:
        for name, weights in new.items():
            self._weights[name].raw_data = weights.numpy().tobytes()
        self._missing -= set(new)
        self._compute = None


class EngineInspector:
    """One layer per ONNX node, in the form of the version the plan was made with."""

    def __init__(self, *made: Any) -> None:
        if not made or made[0] is not SECRET:
            raise TypeError("EngineInspector: No constructor defined!")
        _, engine = made
        self._engine = weakref.ref(engine)

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        engine = alive(self._engine, "ICudaEngine", "EngineInspector")
        if need(format, LayerInformationFormat) != LayerInformationFormat.JSON:
            raise NotImplementedError("the double tells JSON only")
        newer = not engine._settings["version"].startswith("10.")
        functions = {function.name: function for function in engine._model.functions}
        calls = [(call, functions.get(call.op_type)) for call in engine._model.graph.node]
        layers = [
            layer_information(node, f"{node.name} | {call.name} ({call.op_type})", newer)
            for call, function in calls
            for node in (function.node if function else [call])
        ]
        ports = [port_information(name, *port) for name, port in engine._ports.items()]
        return json.dumps(
            {
                "Layers": layers,
                **({"I/O Tensors": ports} if newer else {"Bindings": [*engine._ports]}),
            }
        )


def layer_information(node: onnx.NodeProto, label: str, newer: bool) -> dict[str, Any]:
    """A node as a layer; attention as the fused kernel, unless a test asked for another."""
    fused = node.op_type == "Attention" and not fails("EngineInspector.fused")
    kernel = "_gemm_mha_v2_0x957a" if fused else f"sm90_xmma_{node.op_type.lower()}_f32f32"
    told = {"Format": "Row major linear", "DataType": "Float"}
    typed = told if newer else {"Format/Datatype": "Float"}
    tensor = {"Location": "Device", "Dimensions": [], **typed}
    return {
        "Name": f"{node.name}_myl0_0",
        "LayerType": "kgen" if fused else "gemm",
        "Inputs": [{"Name": name, **tensor} for name in node.input],
        "Outputs": [{"Name": name, **tensor} for name in node.output],
        "TacticName": kernel,
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {label}]",
    }


def port_information(name: str, mode: TensorIOMode, value: Any) -> dict[str, Any]:
    sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
    return {"Name": name, "IOMode": mode.name.capitalize(), "Dimensions": sizes}


def executor(model: onnx.ModelProto) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """ONNX Runtime where it has the types, else the reference evaluator."""
    values = [*model.graph.input, *model.graph.output]
    kinds = {value.type.tensor_type.elem_type for value in values}
    if TensorProto.BFLOAT16 in kinds | {tensor.data_type for tensor in model.graph.initializer}:
        reference = ReferenceEvaluator(model)
        return lambda feeds: [np.asarray(value) for value in reference.run(None, feeds)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: [np.asarray(value) for value in session.run(None, feeds)]


class IExecutionContext:
    def __init__(self, *made: Any) -> None:
        if not made or made[0] is not SECRET:
            raise TypeError("IExecutionContext: No constructor defined!")
        _, engine, strategy = made
        self._engine = weakref.ref(engine)
        self._managed = strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._warm = False
        self._verbosity = ProfilingVerbosity.DETAILED
        track(self)

    def _alive(self) -> ICudaEngine:
        engine = alive(self._engine, "ICudaEngine", "IExecutionContext")
        engine._check()
        return engine

    @property
    def nvtx_verbosity(self) -> ProfilingVerbosity:
        self._alive()
        return self._verbosity

    @nvtx_verbosity.setter
    def nvtx_verbosity(self, verbosity: ProfilingVerbosity) -> None:
        self._alive()
        self._verbosity = need(verbosity, ProfilingVerbosity)

    def set_input_shape(self, name: str, shape: tuple | list | Dims) -> bool:
        engine = self._alive()
        mode, _ = engine._port(name)
        static = engine.get_tensor_shape(name) if mode == TensorIOMode.INPUT else None
        wanted = tuple(need(shape, tuple, list))
        if static is None or fails("IExecutionContext.set_input_shape", name):
            return False
        if len(static) != len(wanted):
            return False
        if any(have not in (-1, size) for have, size in zip(static, wanted, strict=True)):
            return False
        self._shapes[name], self._warm = wanted, False
        return True

    def infer_shapes(self) -> list[str]:
        engine = self._alive()
        if fails("IExecutionContext.infer_shapes", "raises"):
            raise RuntimeError("shape inference failed")
        inputs = [name for name, (mode, _) in engine._ports.items() if mode == TensorIOMode.INPUT]
        lacking = [
            name
            for name in inputs
            if name not in self._shapes and -1 in engine.get_tensor_shape(name)
        ]
        return inputs[:1] if fails("IExecutionContext.infer_shapes", "lacks") else lacking

    def set_tensor_address(self, name: str, memory: int) -> bool:
        engine = self._alive()
        mode, _ = engine._port(name)
        if mode == TensorIOMode.NONE or not need(memory, int):
            return False
        if fails("IExecutionContext.set_tensor_address", name):
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        self._alive()
        return self._addresses.get(need(name, str), 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        engine = self._alive()
        if need(memory, int) % 256 or need(size, int) < engine.device_memory_size_v2:
            say(engine._logger, "device memory refused: alignment or size")
        elif not self._managed:
            say(engine._logger, "device memory refused: the context manages its own")
        else:
            self._memory = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        """TensorRT for RTX alone has it."""
        stream_from(stream)
        return not self._alive()._settings["allocates"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._alive()
        stream = stream_from(stream_handle)
        problem = self._problem(engine)
        if stream.recorded is not None and engine._settings["allocates"]:
            problem = "captured, and it allocates while it runs"
        if problem is None and stream.recorded is not None and not self._warm:
            problem = "captured before it ran once with these shapes"
        if problem is not None:
            say(engine._logger, f"execute_async_v3: {problem}")
            return False
        addresses, memory = dict(self._addresses), self._memory
        work = lambda: self._compute(addresses, memory)  # noqa: E731
        if stream.recorded is None:
            work()
            self._warm = True
        else:
            stream.recorded.append(work)
        return True

    def _problem(self, engine: ICudaEngine) -> str | None:
        if fails("IExecutionContext.execute_async_v3"):
            return "failure injected"
        if missing := [name for name in engine._ports if name not in self._addresses]:
            return f"no address set for {', '.join(missing)}"
        if self.infer_shapes():
            return "shapes are not all set"
        if engine._missing:
            return f"{len(engine._missing)} weights were stripped and never refitted"
        if self._managed and engine.device_memory_size_v2 and self._memory is None:
            return "no device memory was set"
        return None

    def _compute(self, addresses: dict[str, int], memory: tuple[int, int] | None) -> None:
        engine = self._alive()
        if memory is not None:
            ctypes.memset(memory[0], 0xFF, memory[1])  # NaN, if anyone reads it
        feeds, outputs = {}, []
        for name, (mode, _) in engine._ports.items():
            shape = self._shapes.get(name, engine.get_tensor_shape(name))
            array = host_array(addresses[name], NUMPY[engine.get_tensor_dtype(name)], tuple(shape))
            if mode == TensorIOMode.INPUT:
                feeds[name] = array
            else:
                outputs.append(array)
        for array, value in zip(outputs, engine._run(feeds), strict=True):
            if array.dtype != value.dtype or array.shape != value.shape:
                raise RuntimeError(f"the double's model makes {value.dtype} {value.shape}")
            array[...] = value
        if memory is not None:
            ctypes.memset(memory[0], 0xFF, memory[1])


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not need(engine, ICudaEngine).refittable or fails("Refitter.__init__"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine, self._logger = weakref.ref(engine), need(logger, ILogger)
        self._new: dict[str, Weights] = {}
        self._all = list(engine._weights)

    def _alive(self) -> ICudaEngine:
        return alive(self._engine, "ICudaEngine", "Refitter")

    def get_all_weights(self) -> list[str]:
        return self._all

    def get_missing_weights(self) -> list[str]:
        return sorted(self._alive()._missing - set(self._new))

    def get_weights_prototype(self, weights_name: str) -> Weights:
        tensor = self._alive()._weights.get(need(weights_name, str))
        if tensor is None:
            return Weights(DataType.FLOAT, 0, -1)
        return Weights(FROM_ONNX[tensor.data_type], 0, int(np.prod(tensor.dims)))

    @signatures(("name", "weights"), ("name", "weights", "location"))
    def set_named_weights(self, name: str, weights: Weights, location: Any = None) -> bool:
        prototype = self.get_weights_prototype(name)
        fits = (prototype.dtype, prototype.size) == (need(weights, Weights).dtype, weights.size)
        if not fits or fails("Refitter.set_named_weights", name):
            say(self._logger, f"weights {name} refused")
            return False
        self._new[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        engine = self._alive()
        if self.get_missing_weights() or fails("Refitter.refit_cuda_engine"):
            say(self._logger, "refit refused: weights are missing")
            return False
        engine._refit(self._new)  # only now is the caller's memory read
        return True


# What stands in for CUDA: `lcexport.engines.trt.memory.DeviceOps` on the host


class HostStream:
    """Runs at once, unless it records."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], None]] | None = None


streams: "weakref.WeakValueDictionary[int, HostStream]" = weakref.WeakValueDictionary()


def stream_from(handle: int) -> HostStream:
    """The stream of a handle; the real library would end in a CUDA error."""
    if need(handle, int) not in streams:
        raise RuntimeError(f"illegal stream handle {handle:#x}: a CUDA error")
    return streams[handle]


class HostOps:
    """A stream and memory on the host; `events` is what was asked of it, in order."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.device = torch.device("cpu")
        self.events: list[str] = []
        self.memory = memory
        self._stream = HostStream()
        self.stream = id(self._stream)
        streams[self.stream] = self._stream

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.events.append(f"allocate {nbytes}")
        if nbytes > self.memory:
            from lcexport.engines.trt.memory import out_of_memory

            raise out_of_memory(nbytes, f"{self.memory} bytes free")
        block = torch.empty(nbytes + 256, dtype=torch.uint8)
        return block[-block.data_ptr() % 256 :][:nbytes]

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def enter(self) -> None:
        self.events.append("enter")

    def leave(self) -> None:
        self.events.append("leave")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        self._stream.recorded = []
        try:
            enqueue()
            work = self._stream.recorded
        finally:
            self._stream.recorded = None

        def replay() -> None:
            self.events.append("replay")
            for step in work:
                step()

        return replay

    def synchronize(self) -> None:
        self.events.append("synchronize")
