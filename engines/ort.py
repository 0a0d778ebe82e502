"""ONNX Runtime: the portable engine, on a processor, on CUDA, or over TensorRT's plans.

Which execution provider that is, and with what options: `lcexport.engines.ort_providers`.
Tensors are bound by address (IO binding), once for as long as they stay where they are: nothing is
copied on the way in or out, and on CUDA nothing goes through the host. On processors ONNX Runtime
repacks the weights in memory of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines import Engine, TensorSpec
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import GraphRecord
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
RECORDED_SETS = 8  # a recording lives as long as the session
NOT_RECORDED = -1  # ONNX Runtime's number for a run outside of all recordings


class OrtOptions(BaseModel):
    """How a session runs.

    Attributes:
        cuda_graph: record the work on the GPU when tensors first come, and replay it whenever they
            come again. The first eight sets of tensors are recorded; others run as without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cuda_graph: bool = False


@dataclass(frozen=True)
class Bound:
    """A binding, and the addresses that it is of: inputs, then outputs."""

    addresses: tuple[int, ...]
    binding: ort.IOBinding
    options: ort.RunOptions


class OrtEngine:
    """One graph in one ONNX Runtime session. See `lcexport.engines.Engine`.

    Args:
        do: what to do where ONNX Runtime does not open the graph.
        options: how to run it.

    Raises:
        IncompatibleError: ONNX Runtime does not open it, or not with the backend's provider.
    """

    def __init__(
        self,
        graph: Path,
        device: str = "cpu",
        backend: str = "onnxruntime",
        do: str = "Rebuild the bundle, or install the onnxruntime it was built with.",
        options: OrtOptions | None = None,
    ) -> None:
        self.how = options or OrtOptions()
        self.backend, self.device = backend, placed(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._session: ort.InferenceSession | None = self._open(graph, do)
        self.inputs = tuple(spec_from(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(spec_from(argument) for argument in self._session.get_outputs())
        self._bound: Bound | None = None
        self._recorded: dict[tuple[int, ...], int] = {}

    def _open(self, graph: Path, do: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        provider = provider_of(self.backend, self.device)
        stream = self._stream.cuda_stream if self._stream else 0
        recorded = self.how.cuda_graph
        providers = configure(options, provider, self.device, stream, cuda_graph=recorded)
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
        given = [(spec, inputs[spec.name]) for spec in self.inputs]
        given += [(spec, outputs[spec.name]) for spec in self.outputs]
        for spec, tensor in given:
            spec.check(tensor, self.device)
        addresses = tuple(tensor.data_ptr() for _, tensor in given)
        if self._bound is None or self._bound.addresses != addresses:
            self._bound = self._bind(self._session, addresses)
        bound = self._bound
        if self._stream is None:
            self._session.run_with_iobinding(bound.binding, bound.options)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(self._stream)

    def _bind(self, session: ort.InferenceSession, addresses: tuple[int, ...]) -> Bound:
        """Inputs and outputs at `addresses`, in the order of their specs."""
        binding = session.io_binding()
        binds = [binding.bind_input] * len(self.inputs) + [binding.bind_output] * len(self.outputs)
        specs = (*self.inputs, *self.outputs)
        for bind, spec, address in zip(binds, specs, addresses, strict=True):
            bind(
                name=spec.name,
                device_type=self.device.type,
                device_id=self.device.index or 0,
                element_type=ELEMENT_TYPES[spec.dtype],
                shape=spec.shape,
                buffer_ptr=address,
            )
        options = ort.RunOptions()
        if self._stream is not None:
            # The caller's stream waits for ours instead of the host waiting for both.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.how.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(self._recording(addresses)))
        return Bound(addresses, binding, options)

    def _recording(self, addresses: tuple[int, ...]) -> int:
        """The number of these tensors' recording: one replays the addresses it was made with."""
        if addresses not in self._recorded and len(self._recorded) == RECORDED_SETS:
            return NOT_RECORDED
        return self._recorded.setdefault(addresses, len(self._recorded) + 1)

    def close(self) -> None:
        """Release the session and its memory."""
        self._bound = self._session = None

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
    options: Mapping[str, object] | None = None,
) -> OrtEngine:
    """Open the bundle's graph for `resolution`, or the plans compiled from it.

    Args:
        options: fields of `OrtOptions`.

    Raises:
        UsageError: the bundle holds no such resolution, or no such plans.
        IncompatibleError: the provider does not open it; for plans: it never compiles new ones.
        IntegrityError: a file is not the one the manifest names.
    """
    record, how = bundle.graph(resolution), run_options(backend, options or {}, device)
    if backend == "onnxruntime":
        do = {} if bundle.manifest.weights_dtype == "bulk" else {"do": WITHOUT_INT8}
        engine = OrtEngine(bundle.path(graph_file(record, device)), device, options=how, **do)
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


def run_options(backend: str, given: Mapping[str, object], device: str) -> OrtOptions:
    """Options by their names. UsageError names one that is wrong or has no effect here."""
    try:
        options = OrtOptions.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"ONNX Runtime's engines do not take the option {first['loc'][0]}: {first['msg']}",
            got=repr(given.get(str(first["loc"][0]))),
            wanted=f"one of {', '.join(OrtOptions.model_fields)}",
        ) from error
    if options.cuda_graph and (backend != "onnxruntime" or torch.device(device).type != "cuda"):
        raise UsageError(
            "cuda_graph is for ONNX Runtime's CUDA provider",
            got=f"{backend} on {device}",
            wanted="onnxruntime on cuda",
        )
    return options


def graph_file(record: GraphRecord, device: str | torch.device) -> str:
    """The graph that ONNX Runtime runs on `device`: on processors the one of fused operations.

    On CUDA, by ONNX Runtime's source, `Attention` has fused kernels (not run); on processors it
    would keep all N x N scores.
    """
    if torch.device(device).type == "cuda":
        return record.file
    if record.fused is None:
        raise IncompatibleError(
            f"the bundle has no graph of {record.name} for ONNX Runtime on processors",
            wanted=f"dit.{record.name}.ort.onnx, which this version builds",
            do="Rebuild the bundle with --precision fp32.",
        )
    return record.fused


def placed(device: str) -> torch.device:
    """`device` with its number: plain `cuda` is torch's current device, which need not be 0."""
    named = torch.device(device)
    if named.type == "cuda" and named.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return named


def spec_from(argument: ort.NodeArg) -> TensorSpec:
    """The static shape and dtype of a session's input or output."""
    return TensorSpec(argument.name, tuple(argument.shape), TORCH_DTYPES[argument.type])
