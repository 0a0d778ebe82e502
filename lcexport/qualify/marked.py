"""Engines of a graph whose blocks' outputs are marked, as Polygraphy runs them.

ONNX Runtime takes the marked graph as it is. TensorRT compiles it in the segments, and with the
options, of the bundle's engine; one plan is opened at a time.
"""

import importlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from lcexport.checkpoint import is_island
from lcexport.configs.tasks import Job
from lcexport.engines.files import sha256_of
from lcexport.engines.host import release
from lcexport.engines.trt.memory import CudaOps, Workspace, gpu_of
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import open_product
from lcexport.engines.trt.reader import PlanFile
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.engines.trt.worker import compile_graph
from lcexport.graph import prove_precision
from lcexport.graph.int8 import inline_for_parser
from lcexport.graph.segments import Segment, segment_graph
from lcexport.qualify.subject import Subject

ERRORS_ONLY = 3  # ONNX Runtime's log severity
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def metadata(subject: Subject) -> Any:
    """The graph's inputs in Polygraphy's words."""
    found: Any = importlib.import_module("polygraphy.common").TensorMetadata()
    for tensor in subject.record.inputs:
        found.add(tensor.name, np.dtype(tensor.dtype), tensor.shape)
    return found


def ort_runner(subject: Subject, model: ir.Model, names: Sequence[str]) -> Any:
    """Polygraphy's own runner of an ONNX Runtime session."""
    backend: Any = importlib.import_module("polygraphy.backend.onnxrt")

    def session() -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.add_session_config_entry(WEIGHTS_FOLDER, str(subject.bundle.folder.absolute()))
        provider: Any = "CPUExecutionProvider"
        if subject.on_gpu:
            provider = ("CUDAExecutionProvider", {"device_id": str(subject.device.index or 0)})
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        data = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(data, options, providers=[provider])

    return backend.OnnxrtRunner(session, name=subject.backend)


def trt_runner(subject: Subject, model: ir.Model, names: Sequence[str]) -> Any:
    """A runner of TensorRT plans, compiled when it is activated."""
    base: Any = importlib.import_module("polygraphy.backend.base")

    class PlansRunner(base.BaseRunner):
        def activate_impl(self) -> None:
            self.folder = TemporaryDirectory(prefix=".bisect-", dir=subject.folder)
            self.plans = list(compiled(subject, model, Path(self.folder.name)))

        def deactivate_impl(self) -> None:
            self.folder.cleanup()

        def get_input_metadata_impl(self) -> Any:
            return metadata(subject)

        def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
            self.inference_time = 0.0  # nobody asks
            tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in feed_dict.items()}
            for plan in self.plans:
                tensors |= outputs_of(subject, plan, tensors)
                release()
            return OrderedDict((name, tensors[name].float().numpy()) for name in names)

    return PlansRunner(name=subject.backend)


def compiled(subject: Subject, model: ir.Model, folder: Path) -> Iterator[PlanFile]:
    """A plan for each segment of the bundle's engine, with the engine's options."""
    record = subject.engine_record
    assert record is not None
    graph = subject.bundle.path(subject.record.file)
    # The numbers are asked for, not how the weights come to be there.
    plain = {"strip_plan": False, "refit": False, "version_compatible": False}
    options = TrtOptions.model_validate({**record.options, **plain, "weight_streaming": False})
    product = open_product(subject.backend).name
    count = len(record.plans)
    # The proof is of the graph as built: with its marks, a segment's first output is no velocity.
    pairs = zip(segment_graph(model, count), segment_graph(ir.load(graph), count), strict=True)
    for segment, unmarked in pairs:
        path = folder / f"{segment.index:02d}.plan"
        compile_graph(
            product,
            ir.to_proto(inline_for_parser(segment.model)).SerializeToString(),
            graph,
            path,
            options,
            expected(unmarked, subject.bulk, subject.record.job),
            gpu=gpu_of(subject.device),
        )
        yield PlanFile(path, path.stat().st_size, sha256_of(path))


def expected(segment: Segment, bulk: torch.dtype, job: Job) -> Expectations:
    """What the build holds a parsed segment against."""
    islands = [name for name in segment.model.graph.initializers if is_island(name)]
    proof = prove_precision(
        segment.model, bulk, attentions=job.attentions, sparse=job.sparse_attentions
    )
    return Expectations.from_proof(proof, islands)


def outputs_of(
    subject: Subject, plan: PlanFile, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Open one plan, run it on what is there, and close it; the outputs come to the host."""
    workspace = Workspace(CudaOps(subject.device))
    with TrtEngine(open_product(subject.backend), [plan], workspace) as engine:
        inputs = {spec.name: tensors[spec.name].to(engine.device) for spec in engine.inputs}
        outputs = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
            for spec in engine.outputs
        }
        engine.run(inputs, outputs)
        return {name: tensor.cpu() for name, tensor in outputs.items()}
