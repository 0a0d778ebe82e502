"""Compiling a graph into plans: one per segment, each a stage of its own.

A killed build therefore resumes at its segment, and the compiler holds the weights of one segment
at a time.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from lcexport.builder.memory import available_memory_bytes
from lcexport.builder.options import BuildOptions
from lcexport.builder.staging import DoneStage, StageOutput
from lcexport.checkpoint import is_island
from lcexport.configs.errors import BuildError
from lcexport.engines.bundle import (
    EngineRecord,
    FileRecord,
    GraphRecord,
    PlanRecord,
    TensorRecord,
)
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import ProductName, open_product
from lcexport.engines.trt.reader import read_here, this_platform
from lcexport.engines.trt.worker import compile_graph
from lcexport.graph import prove_precision
from lcexport.graph.check import Target, check_graph
from lcexport.graph.segments import Segment, TensorSpec, propose_segments, segment_graph

Stage = Callable[[str, Callable[[], StageOutput]], DoneStage]
Report = Callable[[str, int, int], None]
PERMILLE = 1000
TARGETS: dict[int, Target] = {10: "tensorrt-10", 11: "tensorrt-11"}


def compile_engine(
    stage: Stage,
    folder: Path,
    backend: ProductName,
    graph: GraphRecord,
    options: BuildOptions,
    report: Report,
) -> tuple[EngineRecord, list[DoneStage]]:
    """Compile every segment of `graph`; the record, and the stages it took."""
    model = ir.load(folder / graph.file)
    refuse_violations(model, backend)
    count = options.segments or proposed_segments(model)
    done = []
    for segment in segment_graph(model, count):
        name = f"compile:{backend}:{graph.preset.name}:{segment.index + 1}/{count}"
        work = partial(compile_segment, folder, backend, graph, segment, options, name, report)
        done.append(stage(name, work))
    return engine_record(backend, options, done), done


def refuse_violations(model: ir.Model, backend: ProductName) -> None:
    """BuildError where the product's parser would refuse the graph: said before it is started."""
    major = open_product(backend).version[0]
    target = "tensorrt-rtx" if backend == "tensorrt-rtx" else TARGETS[major]
    if violations := check_graph(model, target):
        raise BuildError(
            f"{target} would refuse this graph",
            got=f"{len(violations)} violations, the first: {violations[0]}",
            do="`lcexport check` lists them all.",
        )


def compile_segment(
    folder: Path,
    backend: ProductName,
    graph: GraphRecord,
    segment: Segment,
    options: BuildOptions,
    name: str,
    report: Report,
) -> StageOutput:
    """One plan, compiled in a process of its own and checked against the graph's proof."""
    proof = prove_precision(segment.model, torch.bfloat16)
    islands = [name for name in segment.model.graph.initializers if is_island(name)]
    file = f"{plans_folder(backend, graph.preset.name)}/{segment.index:02d}.plan"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).unlink(missing_ok=True)  # what a killed stage left under its final name
    made = compile_graph(
        backend,
        ir.to_proto(segment.model).SerializeToString(),
        folder / graph.file,
        folder / file,
        trt_options(options),
        Expectations.from_proof(proof, islands),
        on_progress=lambda fraction, phase: report(name, int(fraction * PERMILLE), PERMILLE),
    )
    plan = PlanRecord(
        file=file,
        first_block=segment.first_block,
        last_block=segment.last_block,
        inputs=tensor_records(segment.inputs),
        outputs=tensor_records(segment.outputs),
        attentions=made.summary.attentions,
    )
    return StageOutput(
        files={file: FileRecord(bytes=made.bytes, sha256=made.sha256)},
        facts={"plan": plan.model_dump(mode="json")},
        child_peak_rss_bytes=made.peak_rss_bytes,
    )


def engine_record(
    backend: ProductName, options: BuildOptions, done: list[DoneStage]
) -> EngineRecord:
    """What the manifest says of the plans: what they were compiled by, and for what."""
    product = open_product(backend)
    here = None if options.device == "cpu" else read_here(product, torch.device(options.device))
    targets = options.compute_capabilities or ((here.compute_capability,) if here else ())
    return EngineRecord(
        plans=tuple(PlanRecord.model_validate(stage.output.facts["plan"]) for stage in done),
        product=backend,
        version=".".join(map(str, product.version)),
        platform=this_platform(),
        compute_capabilities=targets,
        gpu=here.gpu if here else None,
        driver=here.driver if here else None,
        options=trt_options(options).model_dump(mode="json"),
        verified=False,
    )


def plans_folder(backend: str, resolution: str) -> str:
    """Where the plans of one engine lie in the bundle."""
    return f"engines/{backend}/{resolution}"


def trt_options(options: BuildOptions) -> TrtOptions:
    return TrtOptions(compute_capabilities=options.compute_capabilities)


def proposed_segments(model: ir.Model) -> int:
    """As few segments as this machine's memory allows."""
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values()]  # pyright: ignore[reportOptionalMemberAccess]
    depth = len(list(model.graph)) - 2
    return propose_segments(-(-sum(sizes) // depth), depth, available_memory_bytes())


def tensor_records(specs: Iterable[TensorSpec]) -> tuple[TensorRecord, ...]:
    """A segment's borders in torch's words."""
    names = {"FLOAT": "float32", "BFLOAT16": "bfloat16", "BOOL": "bool"}
    return tuple(
        TensorRecord(name=spec.name, shape=spec.shape, dtype=names[spec.dtype.name])
        for spec in specs
    )
