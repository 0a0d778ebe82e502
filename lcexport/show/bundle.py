"""A finished bundle: what it holds, what its checks found, what it made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import ComponentRecord, EngineRecord
from lcexport.show.build import show_stages
from lcexport.show.console import amount, listed, out, show_fact, show_text, table
from lcexport.show.lora import lora_text

if TYPE_CHECKING:  # `inspect` loads none of these
    from lcexport.graph.check import Violation
    from lcexport.runtime import LongVideo, Video
    from lcexport.verify import Check, Report

SHORT = {
    "max_abs": "max",
    "relative_l2": "l2",
    "cosine": "cos",
    "relative_change": "change",
    "identity_error": "identity",
}
VERDICT = {
    True: Text("ok", "green"),
    False: Text("FAILED", "red"),
    None: Text("not checked", "yellow"),
}


def show_bundle(bundle: Bundle) -> None:
    """A bundle's manifest."""
    manifest = bundle.manifest
    source = manifest.source
    show_fact("bundle", f"{bundle.folder} (schema {manifest.schema_version}, {manifest.created})")
    show_fact(
        "source",
        f"{source.layout}, {source.tensors} tensors, {source.dtype}, "
        f"sha256 {source.tensors_sha256[:16]}",
    )
    show_fact("precision", f"{manifest.precision}, islands {manifest.islands}")
    show_fact("weights", manifest.weights_dtype)
    if manifest.loras:
        show_fact("loras", ", ".join(map(lora_text, manifest.loras)))
    none = "none run (compiled only)" if manifest.engines else "none (exported only)"
    show_fact("backends", ", ".join(manifest.backends) or none)
    show_fact("versions", listed(manifest.versions))
    for name, graph in manifest.graphs.items():
        if added := graph.added:
            show_fact("added", f"{name} ({added.created}) with {listed(added.versions)}")
    columns = ("name", ">pixels", ">frames", ">tokens", ">clean latents", "attention", "file")
    graphs = table("Graphs", *columns)
    for name, graph in manifest.graphs.items():
        job = graph.job
        size = f"{job.height} x {job.width}"
        clean = job.num_cond_latents or job.cached_latents
        attention = "sparse" if job.sparse else "dense"
        graphs.add_row(
            name, size, str(job.frames), f"{job.tokens:,}", str(clean), attention, graph.file
        )
    files = table("Files", "file", ">size", "sha256")
    for name, record in manifest.files.items():
        files.add_row(name, amount(record.bytes), record.sha256[:16])
    proofs = table("Precision proof", "graph", "checked", ">count")
    for name, graph in manifest.graphs.items():
        for fact, count in graph.precision_proof.items():
            proofs.add_row(name, fact.replace("_", " "), f"{count:,}")
    out.print(graphs, proofs, files)
    if manifest.engines:
        out.print(engines_table(manifest.engines))
        for backend, compiled in manifest.engines.items():
            for resolution, engine in compiled.items():
                show_fact("engine", f"{backend} {resolution}: {how_compiled(engine)}")
    if manifest.components:
        out.print(components_table(manifest.components))
    show_stages(bundle)


def components_table(components: Mapping[str, ComponentRecord]) -> Table:
    """What was compiled besides the DiT, and how far from the library's it was at the most."""
    columns = ("component", "compiled by", "for", ">packages", ">largest error", "library")
    rows = table("Compiled components", *columns)
    for name, record in components.items():
        errors = [found["relative_l2"] for found in record.errors.values()]
        rows.add_row(
            name,
            f"{record.product} {record.version}",
            built_for(record),
            str(len(record.plans)),
            f"l2 {max(errors):.2g}" if errors else "",
            verified_text(record),
        )
    return rows


def verified_text(engine: EngineRecord) -> Text:
    """Whether it was run where it was built."""
    return Text("verified", "green") if engine.verified else Text("not run", "yellow")


def engines_table(engines: Mapping[str, Mapping[str, EngineRecord]]) -> Table:
    """What was compiled, by what, for which GPUs, and whether it ever ran."""
    columns = ("backend", "resolution", "compiled by", "for", ">plans", ">attentions", "eager")
    rows = table("Engines", *columns)
    for backend, compiled in engines.items():
        for resolution, engine in compiled.items():
            rows.add_row(
                backend,
                resolution,
                f"{engine.product} {engine.version}",
                built_for(engine),
                str(len(engine.plans)),
                str(attentions_of(engine)),
                verified_text(engine),
            )
    return rows


def built_for(engine: EngineRecord) -> str:
    """The GPU, the GPUs, or the processors that an engine is for."""
    if engine.options.get("device") == "cpu":
        return f"{engine.platform} processors"
    return engine.gpu or ", ".join(engine.compute_capabilities) or "all its targets"


def how_compiled(engine: EngineRecord) -> str:
    """Where its weights are, and the options that say something; its targets are in the table."""
    words = [f"weights {'shared' if engine.calls else 'inside'}"]
    for name, value in engine.options.items():
        if name != "compute_capabilities" and value is not None and value is not False:
            said = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
            words.append(f"{name}={said}")
    return ", ".join(words)


def attentions_of(engine: EngineRecord) -> int:
    """Attentions of a pass, none decomposable: a plan may be used more than once."""
    uses = [call.plan for call in engine.calls] or range(len(engine.plans))
    return sum(engine.plans[index].attentions for index in uses)


def show_violations(found: Mapping[str, Sequence[Violation]], target: str) -> None:
    """Which rules for a target are broken, graph by graph."""
    for name, violations in found.items():
        if not violations:
            show_text(f"{name}: breaks none of lcexport's rules for {target}")
        for violation in violations:
            show_text(f"{name}: {violation}")


def show_verification(report: Report) -> None:
    """Every row of a verification, a table for each level, engine and resolution."""
    for place, checks in groupby(report.checks, lambda c: (c.level, c.backend, c.resolution)):
        rows = table(" ".join(filter(None, place)), "check", "found", "")
        above = ""
        for check in checks:
            rows.add_row(check.name, found_and_wanted(check, above), VERDICT[check.ok])
            above = check.wanted
        out.print(rows)
    failed = len(report.failed)
    unchecked = sum(check.ok is None for check in report.checks)
    verdict = "verified" if report.ok else f"{failed} checks failed"
    out.print(verdict + (f", {unchecked} not checked" if unchecked else ""), style="bold")


def found_and_wanted(check: Check, above: str) -> str:
    """What a check measured, and under it the threshold, unless the row above has the same."""
    measured = {name: value for name, value in check.got.items() if name != "mean_abs"}
    found = "  ".join(f"{name} {value:.3g}" for name, value in measured.items())
    wanted = check.wanted if check.ok is None else f"wanted {check.wanted}"
    text = "\n".join(filter(None, (found, "" if check.wanted == above else wanted)))
    return re.sub(r"\w+", lambda word: SHORT.get(word[0], word[0]), text)


def show_video(video: Video, path: Path, contact_sheet: Path | None) -> None:
    """Where a video is, and what it took."""
    frames, height, width, _ = video.frames.shape
    show_text(f"{path}  {width} x {height}, {frames} frames at {video.fps:g}/s")
    if contact_sheet:
        show_text(str(contact_sheet))
    show_text(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in video.timings.items()))


def show_long_video(video: LongVideo, path: Path) -> None:
    """Where a long video is, and where its segments stay."""
    frames, height, width, _ = video.shape
    show_text(f"{path}  {width} x {height}, {frames} frames at {video.fps:g}/s")
    show_text(f"{video.folder}  its segments, no longer needed")
