"""ONNX Runtime: the portable engine, on a processor, on CUDA, or over TensorRT's plans.

Which execution provider that is, and with what options: `lcexport.engines.ort_providers`.
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
from lcexport.engines.ort_providers import (
    configure,
    first_line,
    plans_model,
    provider_of,
    require,
)

__all__ = ["OrtEngine", "open_engine", "require"]

ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; NumPy has no name for it
ELEMENT_TYPES = {torch.float32: np.float32, torch.bool: np.bool_, torch.bfloat16: ONNX_BFLOAT16}
TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(bool)": torch.bool,
    "tensor(bfloat16)": torch.bfloat16,
}
WITHOUT_INT8 = (
    "If it lacks DequantizeLinear of int8 to float32, build with --weights-dtype bulk, or use "
    "another backend."
)
ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OrtEngine:
    """One graph in one ONNX Runtime session. See `lcexport.engines.Engine`.

    Args:
        do: what to do where ONNX Runtime does not open the graph.

    Raises:
        IncompatibleError: ONNX Runtime does not open it, or not with the backend's provider.
    """

    def __init__(
        self,
        graph: Path,
        device: str = "cpu",
        backend: str = "onnxruntime",
        do: str = "Rebuild the bundle, or install the onnxruntime it was built with.",
    ) -> None:
        self.backend, self.device = backend, placed(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._session: ort.InferenceSession | None = self._open(graph, do)
        self.inputs = tuple(spec_from(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(spec_from(argument) for argument in self._session.get_outputs())
        self._options = ort.RunOptions()
        if self._stream is not None:
            # The caller's stream waits for ours instead of the host waiting for both.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _open(self, graph: Path, do: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        provider = provider_of(self.backend, self.device)
        stream = self._stream.cuda_stream if self._stream else 0
        providers = configure(options, provider, self.device, stream)
        try:
            # Without `enable_fallback=0` it would print and go on with the processor.
            session = ort.InferenceSession(
                str(graph), options, providers=providers, enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime has no common base for its own errors
            raise IncompatibleError(
                f"ONNX Runtime {ort.__version__} cannot open {graph}", got=first_line(error), do=do
            ) from error
        if session.get_providers()[0] != provider:
            raise IncompatibleError(
                f"ONNX Runtime {ort.__version__} left out the provider it was asked for",
                got=", ".join(session.get_providers()),
                wanted=provider,
                do="Its log says why.",
            )
        return session

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
                spec.check(tensor, self.device)
                bind(
                    name=spec.name,
                    device_type=self.device.type,
                    device_id=self.device.index or 0,
                    element_type=ELEMENT_TYPES[spec.dtype],
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
    """Open the bundle's graph for `resolution`, or the plans compiled from it.

    Raises:
        UsageError: the bundle holds no such resolution, or no such plans.
        IncompatibleError: the provider does not open it; for plans: it never compiles new ones.
        IntegrityError: a file is not the one the manifest names.
    """
    record = bundle.graph(resolution)
    if backend == "onnxruntime":
        do = {} if bundle.manifest.weights_dtype == "bulk" else {"do": WITHOUT_INT8}
        engine = OrtEngine(bundle.path(record.file), device, **do)
    else:
        path, plans = plans_model(bundle, backend, resolution)
        built = f"{plans.product} {plans.version} for {', '.join(plans.compute_capabilities)}"
        do = f"The plans need {built.removesuffix(' for ')}: install that, or rebuild them here."
        engine = OrtEngine(path, device, backend, do)
    recorded = tuple((tensor.name, tensor.shape) for tensor in record.inputs)
    if recorded != tuple((spec.name, spec.shape) for spec in engine.inputs):
        engine.close()
        raise IntegrityError(f"the inputs of {record.file} are not the ones in the manifest")
    return engine


def placed(device: str) -> torch.device:
    """`device` with its number: plain `cuda` is torch's current device, which need not be 0."""
    named = torch.device(device)
    if named.type == "cuda" and named.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return named


def spec_from(argument: ort.NodeArg) -> TensorSpec:
    """The static shape and dtype of a session's input or output."""
    return TensorSpec(argument.name, tuple(argument.shape), TORCH_DTYPES[argument.type])
