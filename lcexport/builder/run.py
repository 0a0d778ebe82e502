"""The build itself: stages in order, and the manifest that grows with them."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from lcexport.builder.options import BuildOptions
from lcexport.builder.plan import make_plan, refuse_shortage
from lcexport.builder.stages import (
    components_stage,
    draft_bundle,
    engine_stage,
    golden_name,
    golden_stage,
    graph_name,
    graph_stage,
    require_components,
    source_identity,
    versions,
    weights_stage,
)
from lcexport.builder.staging import Addition, DoneStage, NewBundle, StageOutput, Workplace
from lcexport.checkpoint import Checkpoint, check_tensors, open_checkpoint
from lcexport.configs.errors import UsageError
from lcexport.engines import require_backend
from lcexport.engines.bundle import (
    Bundle,
    FileRecord,
    GraphRecord,
    Manifest,
    SourceRecord,
    StageRecord,
    open_bundle,
)

log = logging.getLogger(__name__)

# (stage, done, total): bytes for `weights`; 0 of 1 and 1 of 1 around every other stage.
BuildProgress = Callable[[str, int, int], None]


def build(options: BuildOptions, on_progress: BuildProgress | None = None) -> Bundle:
    """Build a bundle, or add resolutions to one.

    Raises:
        InputError: the checkpoint is missing, incomplete, damaged or contradicts its config.
        ResourceError: disk or memory will not do, or the output is occupied.
        LockedError: another build holds the output.
        BuildError: a graph breaks the precision policy, or an engine disagrees with eager.
    """
    report = on_progress or (lambda stage, done, total: None)
    checkpoint = open_checkpoint(options.model)
    check_tensors(checkpoint)
    check_environment(checkpoint, options)
    refuse_shortage(make_plan(checkpoint, options))
    old = None
    place: Workplace
    if options.add:
        old = open_bundle(options.output).manifest
        check_addition(old, options)
        place = Addition(options.output, old)
    else:
        fingerprint = {**options.fingerprint(), "source": source_identity(checkpoint)}
        place = NewBundle(options.output, fingerprint, resume=options.resume)
    with place:
        manifest = run_stages(place, checkpoint, options, old, report)
        place.publish(manifest)
    return open_bundle(options.output)


def run_stages(
    place: Workplace,
    checkpoint: Checkpoint,
    options: BuildOptions,
    old: Manifest | None,
    report: BuildProgress,
) -> Manifest:
    """Run every stage in order; the manifest grows with each."""
    version = versions(options.backends)

    def run(name: str, work: Callable[[], StageOutput]) -> DoneStage:
        report(name, 0, 1)
        done = place.run(name, work)
        log.info("%s: %.1f s", name, done.record.seconds)
        report(name, 1, 1)
        return done

    if old is None:
        converted = run(
            "weights",
            lambda: weights_stage(
                checkpoint, options, place.folder, lambda d, t: report("weights", d, t)
            ),
        )
        copied = run("components", lambda: components_stage(checkpoint, place.folder))
        manifest = first_manifest(options, version, [converted, copied])
    else:
        engines = dict.fromkeys(old.backends + (options.backends if options.only == "all" else ()))
        manifest = old.model_copy(update={"backends": tuple(engines)})
    for preset in options.presets:
        graph = run(
            f"graph:{preset.name}",
            lambda preset=preset: graph_stage(preset, options, place.folder, version["lcexport"]),
        )
        record = GraphRecord.model_validate(graph.output.facts["graph"])
        manifest = grown(manifest, [graph], record)
        if options.only == "export":
            continue
        golden = run(
            f"golden:{preset.name}",
            lambda preset=preset, record=record: golden_stage(
                preset, record, options, place.folder
            ),
        )
        record = record.model_copy(update={"golden": golden_name(preset)})
        manifest = grown(manifest, [golden], record)
        for backend in options.backends:
            draft = draft_bundle(place.folder, manifest)
            checked = run(
                f"engine:{backend}:{preset.name}",
                lambda draft=draft, backend=backend, preset=preset: engine_stage(
                    backend, draft, preset, options
                ),
            )
            manifest = grown(manifest, [checked], record)
    return manifest


def first_manifest(
    options: BuildOptions, version: dict[str, str], stages: list[DoneStage]
) -> Manifest:
    """The manifest after the stages every resolution shares."""
    files: dict[str, FileRecord] = {}
    for done in stages:
        files |= done.output.files
    return Manifest(
        name=options.output.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=SourceRecord.model_validate(stages[0].output.facts["source"]),
        precision=options.precision,
        islands=options.islands,
        backends=options.backends if options.only == "all" else (),
        graphs={},
        files=files,
        versions=version,
        device=options.device,
        effective=options.effective(),
        stages=tuple(done.record for done in stages),
    )


def grown(manifest: Manifest, stages: list[DoneStage], record: GraphRecord) -> Manifest:
    """`manifest` with the files and costs of more stages, and one graph put in or updated."""
    files = dict(manifest.files)
    records: list[StageRecord] = list(manifest.stages)
    for done in stages:
        files |= done.output.files
        records.append(done.record)
    graphs = {**manifest.graphs, record.preset.name: record}
    return manifest.model_copy(update={"files": files, "stages": tuple(records), "graphs": graphs})


def check_environment(checkpoint: Checkpoint, options: BuildOptions) -> None:
    """Refuse now what a later stage would refuse after an hour: components, device, backends."""
    if options.only == "all":
        require_components(checkpoint)
        for backend in options.backends:
            require_backend(backend, options.precision, options.device)


def check_addition(manifest: Manifest, options: BuildOptions) -> None:
    """An added resolution must share the bundle's weights, and be new."""
    for field in ("precision", "islands"):
        if getattr(manifest, field) != getattr(options, field):
            raise UsageError(
                f"the bundle {options.output} has another {field}",
                got=getattr(options, field),
                wanted=getattr(manifest, field),
            )
    for preset in options.presets:
        if preset.name in manifest.graphs:
            raise UsageError(f"the bundle {options.output} has {preset.name} already")
        taken = {graph_name(preset), golden_name(preset)} & set(manifest.files)
        assert not taken, f"files of an absent graph: {taken}"
