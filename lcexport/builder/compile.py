"""Compiling a graph into plans, each a stage of its own.

The plans are the graph's segments, with their weights inside; or its functions, one plan for all
the blocks, with the weights handed in when they run. A killed build resumes at its plan, and the
compiler holds what belongs to one plan at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from lcexport.builder.options import BuildOptions
from lcexport.builder.sparse_kernel import sparse_kernel
from lcexport.builder.stages import file_record
from lcexport.builder.staging import DoneStage, StageOutput
from lcexport.checkpoint import is_island
from lcexport.configs.errors import BuildError, IncompatibleError, ResourceError
from lcexport.engines.folders import cache_folder
from lcexport.engines.host import available_memory_bytes
from lcexport.engines.manifest import (
    CallRecord,
    EngineRecord,
    FileRecord,
    GraphRecord,
    PlanRecord,
    TensorRecord,
)
from lcexport.engines.trt.memory import gpu_of
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions, bf16_targets, require_supported
from lcexport.engines.trt.probe import require_builder
from lcexport.engines.trt.product import Product, ProductName, open_product
from lcexport.engines.trt.reader import read_here, this_platform
from lcexport.engines.trt.worker import compile_graph
from lcexport.graph import prove_precision, save_graph
from lcexport.graph.check import Target, check_graph
from lcexport.graph.epcontext import wrap_plans
from lcexport.graph.int8 import inline_for_parser
from lcexport.graph.parts import Part, PartCall, parts_of
from lcexport.graph.segments import (
    Segment,
    TensorSpec,
    depth_of,
    propose_segments,
    segment_graph,
)

Stage = Callable[[str, Callable[[], StageOutput]], DoneStage]
Report = Callable[[str, int, int], None]
PERMILLE = 1000
TARGETS: dict[int, Target] = {10: "tensorrt-10", 11: "tensorrt-11"}


@dataclass(frozen=True)
class Unit:
    """What becomes one plan: a graph, and the record that its attentions are still missing from."""

    model: ir.Model
    record: PlanRecord
    islands: tuple[str, ...]


def compile_engine(
    stage: Stage,
    folder: Path,
    backend: ProductName,
    graph: GraphRecord,
    options: BuildOptions,
    report: Report,
) -> tuple[EngineRecord, list[DoneStage]]:
    """Compile every plan of `graph`; the record, and the stages it took."""
    model = ir.load(folder / graph.file)
    refuse_violations(model, backend)
    place = plans_folder(backend, graph.name)
    calls: tuple[CallRecord, ...] = ()
    if options.weights == "shared":
        parts, uses = parts_of(model)
        units = list(part_units(place, parts, uses))
        calls = call_records(uses)
    else:
        count = options.segments or proposed_segments(model)
        units = [segment_unit(place, segment) for segment in segment_graph(model, count)]
    done = []
    for number, unit in enumerate(units, start=1):
        name = f"compile:{backend}:{graph.name}:{number}/{len(units)}"
        work = partial(compile_unit, folder, backend, graph, unit, options, name, report)
        done.append(stage(name, work))
    record = engine_record(backend, options, done, calls)
    if options.ep_context:
        work = partial(context_stage, folder, backend, record, graph)
        done.append(stage(f"context:{backend}:{graph.name}", work))
        record = record.model_copy(update={"ep_context": context_name(backend, graph.name)})
    return record, done


def segment_unit(place: str, segment: Segment) -> Unit:
    """A run of blocks, with its weights inside."""
    record = PlanRecord(
        file=f"{place}/{segment.index:02d}.plan",
        first_block=segment.first_block,
        last_block=segment.last_block,
        inputs=tensor_records(segment.inputs),
        outputs=tensor_records(segment.outputs),
        attentions=0,
    )
    return Unit(segment.model, record, tuple(filter(is_island, segment.model.graph.initializers)))


def part_units(
    place: str, parts: list[Part], calls: list[PartCall], suffix: str = ".plan"
) -> Iterator[Unit]:
    """The graph's functions, without weights."""
    for index, part in enumerate(parts):
        prefix = next(call.prefix for call in calls if call.part == index)
        record = PlanRecord(
            file=f"{place}/{part.name.lower()}{suffix}",
            first_block=None,
            last_block=None,
            inputs=tensor_records(part.inputs),
            weights=tensor_records(part.weights),
            outputs=tensor_records(part.outputs),
            attentions=0,
        )
        islands = [spec.name for spec in part.weights if is_island(prefix + spec.name)]
        yield Unit(part.model, record, tuple(islands))


def call_records(uses: Iterable[PartCall]) -> tuple[CallRecord, ...]:
    """The uses of the plans, as the manifest has them."""
    return tuple(CallRecord(plan=u.part, prefix=u.prefix, tensors=u.tensors) for u in uses)


def require_compiler(backend: ProductName, options: BuildOptions) -> None:
    """Refuse now what the compiler would refuse after the weights: its targets, or all work here.

    Raises:
        UsageError: a compute capability that the product does not compile for.
        IncompatibleError: the product cannot make a builder on this machine, or lacks an option.
    """
    product, trt = open_product(backend), options.trt
    target_of(product)
    require_supported(product, trt)
    if low := sorted(set(trt.compute_capabilities) - set(known := bf16_targets(product))):
        raise IncompatibleError(
            f"{product} has no bfloat16 on these GPUs",
            got=", ".join(low),
            wanted=f"some of {', '.join(known)}",
        )
    if product.is_rtx and options.device == "cpu" and (trt.refit or trt.strip_plan):
        raise IncompatibleError(
            f"{product} compiles no plans that can be refitted without a GPU (with one: not tried)",
            do="Use --weights shared, whose weights are exchanged without refitting.",
        )
    cache = options.trt.timing_cache
    if cache is not None and not cache.parent.is_dir():
        raise ResourceError("no such folder", got=cache.parent, do="Create it first.")
    require_builder(backend, gpu_of(torch.device(options.device)))


def target_of(product: Product) -> Target:
    """Whose rules a graph is held against. IncompatibleError: a version that has none here."""
    if product.is_rtx:
        return "tensorrt-rtx"
    major = product.version[0]
    if major not in TARGETS:
        raise IncompatibleError(
            "lcexport has no rules for this TensorRT",
            got=product,
            wanted=" or ".join(TARGETS.values()),
            do=f"pip install 'tensorrt-cu13<{max(TARGETS) + 1}'",
        )
    return TARGETS[major]


def refuse_violations(model: ir.Model, backend: ProductName) -> None:
    """BuildError where the graph breaks our rules for the product: said before it is started."""
    target = target_of(open_product(backend))
    if violations := check_graph(model, target):
        raise BuildError(
            f"this graph breaks lcexport's rules for {target}",
            got=f"{len(violations)} violations, the first: {violations[0]}",
            do="`lcexport check` lists them all.",
        )


def compile_unit(
    folder: Path,
    backend: ProductName,
    graph: GraphRecord,
    unit: Unit,
    options: BuildOptions,
    name: str,
    report: Report,
) -> StageOutput:
    """One plan, compiled in a process of its own and checked against the graph's proof."""
    proof = prove_precision(
        unit.model,
        torch.bfloat16,
        attentions=graph.job.attentions,
        sparse=graph.job.sparse_attentions,
    )
    file = unit.record.file
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).unlink(missing_ok=True)  # what a killed stage left under its final name
    made = compile_graph(
        backend,
        ir.to_proto(inline_for_parser(unit.model)).SerializeToString(),
        folder / graph.file,
        folder / file,
        trt_options(backend, options),
        Expectations.from_proof(proof, unit.islands),
        on_progress=lambda fraction, phase: report(name, int(fraction * PERMILLE), PERMILLE),
        refittable=list(unit.model.graph.initializers),
        cache_named=options.trt.timing_cache is not None,
        gpu=gpu_of(torch.device(options.device)),
        kernel=sparse_kernel(folder, backend, graph.job, options),
    )
    record = unit.record.model_copy(update={"attentions": made.summary.attentions})
    return StageOutput(
        files={file: FileRecord(bytes=made.bytes, sha256=made.sha256)},
        facts={"plan": record.model_dump(mode="json")},
        child_peak_rss_bytes=made.peak_rss_bytes,
    )


def context_stage(
    folder: Path, backend: ProductName, record: EngineRecord, graph: GraphRecord
) -> StageOutput:
    """The ONNX model that wraps the plans for ONNX Runtime."""
    name = context_name(backend, graph.name)
    save_graph(wrap_plans(backend, record, graph, version("lcexport")), folder / name)
    return StageOutput(files={name: file_record(folder / name)})


def engine_record(
    backend: ProductName,
    options: BuildOptions,
    done: list[DoneStage],
    calls: tuple[CallRecord, ...],
) -> EngineRecord:
    """What the manifest says of the plans: what they were compiled by, and for what."""
    product = open_product(backend)
    # An RTX plan is for its targets, whatever GPU is here.
    on_gpu = options.device != "cpu" and not product.is_rtx
    here = read_here(product, torch.device(options.device)) if on_gpu else None
    targets = options.trt.compute_capabilities or ((here.compute_capability,) if here else ())
    return EngineRecord(
        plans=tuple(PlanRecord.model_validate(stage.output.facts["plan"]) for stage in done),
        calls=calls,
        product=backend,
        version=".".join(map(str, product.version)),
        platform=this_platform(),
        compute_capabilities=targets,
        gpu=here.gpu if here else None,
        driver=here.driver if here else None,
        options=options.trt.model_dump(mode="json", exclude={"timing_cache"}),
        verified=False,
    )


def plans_folder(backend: str, graph: str) -> str:
    """Where the plans of one engine lie in the bundle."""
    return f"engines/{backend}/{graph}"


def trt_options(backend: ProductName, options: BuildOptions) -> TrtOptions:
    """The build's options, with a timing cache where the product measures kernels.

    A graph is the same block again and again: what was measured for one is meant to serve the
    others, the next segment and the next build (not tried). A cache is kept for one
    version, GPU, driver and platform, which name it.
    """
    if backend != "tensorrt" or options.trt.timing_cache is not None or options.device == "cpu":
        return options.trt
    here = read_here(open_product(backend), torch.device(options.device))
    name = re.sub(
        r"[^\w.]+", "-", f"{here.version}-{here.gpu}-{here.driver}-{here.platform}"
    ).lower()
    cache = cache_folder("timing") / f"{name}.cache"
    return options.trt.model_copy(update={"timing_cache": cache})


def context_name(backend: str, graph: str) -> str:
    """The EPContext model of one engine; in the bundle's root, because no plan may lie above it."""
    return f"dit.{graph}.{backend}.ctx.onnx"


def proposed_segments(model: ir.Model) -> int:
    """As few segments as this machine's memory allows."""
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values()]  # pyright: ignore[reportOptionalMemberAccess]
    depth = depth_of(model)
    return propose_segments(-(-sum(sizes) // depth), depth, available_memory_bytes())


def tensor_records(specs: Iterable[TensorSpec]) -> tuple[TensorRecord, ...]:
    """A segment's borders in torch's words."""
    names = {"FLOAT": "float32", "BFLOAT16": "bfloat16", "BOOL": "bool", "INT8": "int8"}
    return tuple(
        TensorRecord(name=spec.name, shape=spec.shape, dtype=names[spec.dtype.name])
        for spec in specs
    )
