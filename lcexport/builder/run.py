"""The build itself: stages in order, and the manifest that grows with them."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from lcexport.builder.aoti import compile_packages, compiled_for, require_packages
from lcexport.builder.compile import (
    compile_engine,
    context_name,
    plans_folder,
    require_compiler,
)
from lcexport.builder.components import check_kept, component_stages, components_to_compile
from lcexport.builder.options import BuildOptions
from lcexport.builder.plan import Plan, make_plan, refuse_shortage
from lcexport.builder.sparse_kernel import require_sparse_kernel
from lcexport.builder.stages import (
    components_stage,
    engine_stage,
    fused_name,
    golden_name,
    golden_stage,
    graph_name,
    graph_stage,
    now,
    open_source,
    source_identity,
    versions,
    weights_stage,
)
from lcexport.builder.staging import Addition, DoneStage, NewBundle, StageOutput, Workplace
from lcexport.checkpoint import Checkpoint, check_components
from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job
from lcexport.engines import require_backend
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.host import release
from lcexport.engines.manifest import (
    COMPONENTS,
    FileRecord,
    GraphRecord,
    LoraRecord,
    Manifest,
    SourceRecord,
)
from lcexport.graph.components import check_decoder
from lcexport.graph.segments import require_segments
from lcexport.lora import open_merge

log = logging.getLogger(__name__)

# (stage, done, total): bytes for `weights`; 0 of 1 and 1 of 1 around every other stage.
BuildProgress = Callable[[str, int, int], None]
Stage = Callable[[str, Callable[[], StageOutput]], DoneStage]


def build(options: BuildOptions, on_progress: BuildProgress | None = None) -> Bundle:
    """Build a bundle, or add resolutions to one.

    Raises:
        InputError: the checkpoint is missing, incomplete, damaged or contradicts its config.
        ResourceError: disk or memory will not do, or the output is occupied.
        LockedError: another build holds the output.
        BuildError: a graph breaks the precision policy, or an engine disagrees with eager.
    """
    report = on_progress or (lambda stage, done, total: None)
    checkpoint = preflight(options)
    if options.add:
        with Addition(options.output) as addition:
            # Under the lock: another builder may have added to the bundle a moment ago.
            jobs = options.jobs(checkpoint.config)
            old = addable_bundle(options, jobs)
            check_kept(options, jobs, old.components)
            addition.claim(made_by(options, jobs, old))
            addition.publish(run_stages(addition, checkpoint, options, old, report))
        return open_bundle(options.output)
    fingerprint = {
        **options.fingerprint(),
        "source": source_identity(checkpoint),
        "versions": versions(options.backends),
    }
    if options.loras:
        merge = open_merge(options.loras, checkpoint.config)
        fingerprint["loras"] = [record.model_dump() for record in merge.records]
    if "aotinductor" in options.compiled:  # packages of two processors would be told of one
        fingerprint["machine"] = json.loads(json.dumps(compiled_for(options)))
    with NewBundle(options.output, fingerprint, resume=options.resume) as place:
        place.publish(run_stages(place, checkpoint, options, None, report))
    return open_bundle(options.output)


def preflight(
    options: BuildOptions, on_plan: Callable[[Plan], None] = lambda plan: None
) -> Checkpoint:
    """What the build starts from; every refusal that can come before a byte is written comes now.

    Args:
        on_plan: handed the plan before disk and memory are held against it.
    """
    checkpoint = open_source(options)
    check_environment(checkpoint, options)
    plan = make_plan(checkpoint, options)
    on_plan(plan)
    refuse_shortage(plan)
    return checkpoint


def made_by(options: BuildOptions, jobs: Sequence[Job], old: Manifest) -> list[str]:
    """The files and folders that adding these graphs makes."""
    components = components_to_compile(options, jobs, old.components)
    names = [make(job) for job in jobs for make in (graph_name, fused_name, golden_name)]
    made = (plans_folder, context_name) if options.ep_context else (plans_folder,)
    names += [plans_folder("aotinductor", component.name) for component in components]
    return names + [f(b, job.name) for b in options.compiled for job in jobs for f in made]


def run_stages(
    place: Workplace,
    checkpoint: Checkpoint,
    options: BuildOptions,
    old: Manifest | None,
    report: BuildProgress,
) -> Manifest:
    """Run every stage in order; the manifest grows with each."""
    stage = partial(run_stage, place, report)
    if old is None:
        manifest = shared_stages(stage, place.folder, checkpoint, options, report)
    else:
        engines = dict.fromkeys(old.backends + options.engines)
        manifest = old.model_copy(update={"backends": tuple(engines)})
    jobs = options.jobs(checkpoint.config)
    for job in jobs:
        manifest = job_stages(stage, place.folder, job, options, manifest, report)
    for component in components_to_compile(options, jobs, manifest.components):
        record, done = component_stages(stage, place.folder, component, options, manifest)
        for one in done:
            manifest = grown(manifest, one)
        components = {**manifest.components, component.name: record}
        manifest = manifest.model_copy(update={"components": components})
    return manifest


def run_stage(
    place: Workplace, report: BuildProgress, name: str, work: Callable[[], StageOutput]
) -> DoneStage:
    """Run one stage, or take it from the journal, and say so."""
    report(name, 0, 1)
    done = place.run(name, work)
    release()  # a compiler in another process, and TensorRT in this one, need what torch holds back
    log.info("%s: %.1f s", name, done.record.seconds)
    report(name, 1, 1)
    return done


def shared_stages(
    stage: Stage,
    folder: Path,
    checkpoint: Checkpoint,
    options: BuildOptions,
    report: BuildProgress,
) -> Manifest:
    """What every resolution shares: the weights and the components."""
    progress = partial(report, "weights")
    converted = stage("weights", partial(weights_stage, checkpoint, options, folder, progress))
    copied = stage("components", partial(components_stage, checkpoint, folder))
    return first_manifest(options, [converted, copied])


def job_stages(
    stage: Stage,
    folder: Path,
    job: Job,
    options: BuildOptions,
    manifest: Manifest,
    report: BuildProgress,
) -> Manifest:
    """One graph, its golden outputs, and each engine held against them."""
    name = job.name
    graph = stage(f"graph:{name}", partial(graph_stage, job, options, folder))
    record = GraphRecord.model_validate(graph.output.facts["graph"])
    manifest = grown(manifest, graph, record)
    for backend in options.compiled:
        if backend == "aotinductor":
            engine, plans = compile_packages(stage, folder, record, options)
        else:
            engine, plans = compile_engine(stage, folder, backend, record, options, report)
        for plan in plans:
            manifest = grown(manifest, plan, record)
        compiled = {**manifest.engines.get(backend, {}), name: engine}
        engines = {**manifest.engines, backend: compiled}
        manifest = manifest.model_copy(update={"engines": engines})
    if options.only != "all":
        return manifest
    golden = stage(f"golden:{name}", partial(golden_stage, record, options, folder))
    record = record.model_copy(update={"golden": golden_name(job)})
    manifest = grown(manifest, golden, record)
    for backend in options.engines:
        work = partial(engine_stage, backend, Bundle(folder, manifest), job, options)
        manifest = grown(manifest, stage(f"engine:{backend}:{name}", work), record)
        manifest = verified(manifest, backend, name)
    return manifest


def verified(manifest: Manifest, backend: str, graph: str) -> Manifest:
    """`manifest` with one compiled engine marked as run against eager torch."""
    compiled = manifest.engines.get(backend, {})
    if graph not in compiled:
        return manifest
    record = compiled[graph].model_copy(update={"verified": True})
    engines = {**manifest.engines, backend: {**compiled, graph: record}}
    return manifest.model_copy(update={"engines": engines})


def first_manifest(options: BuildOptions, stages: list[DoneStage]) -> Manifest:
    """The manifest after the stages every resolution shares."""
    files: dict[str, FileRecord] = {}
    for done in stages:
        files |= done.output.files
    loras = stages[0].output.facts.get("loras", [])
    return Manifest(
        name=options.output.name,
        created=now(),
        source=SourceRecord.model_validate(stages[0].output.facts["source"]),
        precision=options.precision,
        islands=options.islands,
        weights_dtype=options.weights_dtype,
        backends=options.engines,
        graphs={},
        files=files,
        versions=versions(options.backends),
        device=options.device,
        effective={**options.effective(), "loras": loras},
        loras=TypeAdapter(tuple[LoraRecord, ...]).validate_python(loras),
        stages=tuple(done.record for done in stages),
    )


def grown(manifest: Manifest, done: DoneStage, record: GraphRecord | None = None) -> Manifest:
    """`manifest` with one stage's files and cost, and where given one graph put in or updated."""
    return manifest.model_copy(
        update={
            "files": {**manifest.files, **done.output.files},
            "stages": (*manifest.stages, done.record),
            "graphs": {**manifest.graphs, **({record.name: record} if record else {})},
        }
    )


def check_environment(checkpoint: Checkpoint, options: BuildOptions) -> None:
    """Refuse now what a later stage would refuse after an hour: components, device, backends."""
    jobs = options.jobs(checkpoint.config)
    old = addable_bundle(options, jobs) if options.add else None
    if old is None:
        needed = options.only == "all" or options.compile_components
        check_components(checkpoint, required=COMPONENTS if needed else ())
    for backend in options.compiled + options.engines:
        require_backend(backend, options.precision, options.device)
    if "aotinductor" in options.compiled:
        require_packages(jobs)
    if options.compile_components:
        check_decoder(checkpoint.components["vae"])
    if old is not None:
        check_kept(options, jobs, old.components)
    for backend in options.tensorrt:
        require_compiler(backend, options)
        require_sparse_kernel(backend, options, jobs)
    if options.tensorrt:
        require_segments(options.segments or 1, checkpoint.config.depth)


def addable_bundle(options: BuildOptions, jobs: Iterable[Job]) -> Manifest:
    """The bundle's manifest, where graphs of these options may be added to it."""
    bundle = open_bundle(options.output)
    manifest = bundle.manifest
    for field in ("precision", "islands", "weights_dtype"):
        if getattr(manifest, field) != getattr(options, field):
            raise UsageError(
                f"the bundle {options.output} has another {field}",
                got=getattr(options, field),
                wanted=getattr(manifest, field),
            )
    if manifest.baked and options.tensorrt and options.weights == "inside":
        raise UsageError(
            f"LoRAs are baked into {options.output}, and plans with weights inside would keep them",
            do="`lcexport lora remove` first, or --weights shared.",
        )
    for job in jobs:
        if job.name in manifest.graphs:
            raise UsageError(f"the bundle {options.output} has {job.name} already")
    parts = {name.split("/")[0] for name in manifest.files}
    needed = options.only == "all" or options.compile_components
    if needed and (missing := [name for name in COMPONENTS if name not in parts]):
        raise UsageError(
            f"the bundle {options.output} was exported without {', '.join(missing)}",
            do="Add to it with --only export, or build a whole one.",
        )
    return manifest
