"""ONNX Runtime: the portable engine. Processor by default, CUDA where `onnxruntime-gpu` is.

Tensors are bound by address (IO binding): nothing is copied on the way in or out, and on CUDA
nothing goes through the host. On processors ONNX Runtime repacks the weights in memory of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
import torch

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines import Engine, TensorSpec
from lcexport.engines.bundle import Bundle

NUMPY_DTYPES = {torch.float32: np.float32, torch.bool: np.bool_}
TORCH_DTYPES = {"tensor(float)": torch.float32, "tensor(bool)": torch.bool}
ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OrtEngine:
    """One graph in one ONNX Runtime session. See `lcexport.engines.Engine`."""

    backend = "onnxruntime"

    def __init__(self, graph: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        self._session: ort.InferenceSession | None = self._open(graph)
        self.inputs = tuple(spec_from(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(spec_from(argument) for argument in self._session.get_outputs())
        self._options = ort.RunOptions()
        if self._stream is not None:
            # The caller's stream waits for ours instead of the host waiting for both.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _open(self, graph: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            settings = {
                "device_id": str(self.device.index or 0),
                "user_compute_stream": str(self._stream.cuda_stream),
            }
            providers = [("CUDAExecutionProvider", settings)]
            # An operation CUDA lacks is an error, not a silent trip through the host.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            return ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as error:  # ONNX Runtime has no common base for its own errors
            raise IncompatibleError(
                f"ONNX Runtime {ort.__version__} cannot open {graph}",
                got=str(error).strip().splitlines()[0],
                do="Rebuild the bundle, or install the onnxruntime it was built with.",
            ) from error

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `lcexport.engines.Engine.run`."""
        if self._session is None:
            raise UsageError("the engine is closed")
        binding = self._session.io_binding()
        for specs, tensors, bind in (
            (self.inputs, inputs, binding.bind_input),
            (self.outputs, outputs, binding.bind_output),
        ):
            for spec in specs:
                tensor = tensors[spec.name]
                spec.check(tensor)
                bind(
                    name=spec.name,
                    device_type=self.device.type,
                    device_id=self.device.index or 0,
                    element_type=NUMPY_DTYPES[spec.dtype],
                    shape=spec.shape,
                    buffer_ptr=tensor.data_ptr(),
                )
        if self._stream is None:
            self._session.run_with_iobinding(binding, self._options)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(binding, self._options)
        current.wait_stream(self._stream)

    def close(self) -> None:
        """Release the session and its memory."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_engine(
    backend: str,
    bundle: Bundle,
    resolution: str,
    device: str = "cpu",
    like: Engine | None = None,
) -> OrtEngine:
    """Open the bundle's graph for `resolution`."""
    record = bundle.graph(resolution)
    engine = OrtEngine(bundle.path(record.file), device)
    recorded = tuple((tensor.name, tensor.shape) for tensor in record.inputs)
    if recorded != tuple((spec.name, spec.shape) for spec in engine.inputs):
        engine.close()
        raise IntegrityError(f"the inputs of {record.file} are not the ones in the manifest")
    return engine


def spec_from(argument: ort.NodeArg) -> TensorSpec:
    """The static shape and dtype of a session's input or output."""
    return TensorSpec(argument.name, tuple(argument.shape), TORCH_DTYPES[argument.type])


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`."""
    if device.type == "cuda":
        require_cuda()
    elif device.type != "cpu":
        raise UsageError(
            "unknown device for onnxruntime", got=repr(str(device)), wanted="cpu, cuda"
        )
    elif precision == "bf16":
        raise IncompatibleError(
            "ONNX Runtime has no bfloat16 arithmetic on processors",
            got="precision bf16 on cpu",
            do="Build with --precision fp32, or use --device cuda.",
        )


def require_cuda() -> None:
    """Raise IncompatibleError unless both torch and ONNX Runtime can use CUDA."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise IncompatibleError(
            "this onnxruntime has no CUDA provider",
            got=", ".join(ort.get_available_providers()),
            do="Both wheels hold the same files, so: pip uninstall -y onnxruntime onnxruntime-gpu "
            "&& pip install onnxruntime-gpu",
        )
    if not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device", do="Install a CUDA build of torch, or use --device cpu."
        )
