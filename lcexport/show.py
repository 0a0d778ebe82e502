"""Results on standard output: tables for people, JSON for programs. Knows not how they were made.

Tables are readable in 80 columns. No text is taken for markup: a path may hold `[b]` or `:cat:`.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lcexport.builder import Plan
from lcexport.checkpoint import ConvertReport, ValidationReport
from lcexport.doctor import Diagnosis, Gpu, Product, Verdict
from lcexport.engines.bundle import Bundle, EngineRecord
from lcexport.graph.check import Violation
from lcexport.runtime import Video
from lcexport.verify import Check, Report

PLAIN_WIDTH = 140  # where the output is no terminal
SCHEMA_VERSION = 1  # of every JSON document that does not carry one of its own
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
LABEL = 14  # characters before a fact

out = Console(
    soft_wrap=True,
    markup=False,
    emoji=False,
    highlight=False,
    width=None if sys.stdout.isatty() else PLAIN_WIDTH,
)


def show_json(document: Mapping[str, object]) -> None:
    """One JSON document on standard output. JSON has no NaN or infinity: they become null."""
    versioned = without_nan({"schema_version": SCHEMA_VERSION, **document})
    sys.stdout.write(json.dumps(versioned, indent=2, default=str, allow_nan=False) + "\n")


def without_nan(value: object) -> object:
    """The same document with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_text(text: str) -> None:
    """A line as it is."""
    out.print(text)


def show_fact(label: str, text: str) -> None:
    """`label   text`, wrapped between words with the text's own margin."""
    lines = textwrap.wrap(
        text, max(out.width - LABEL, 1), break_long_words=False, break_on_hyphens=False
    )
    out.print(label.ljust(LABEL) + ("\n" + " " * LABEL).join(lines))


def table(title: str, *columns: str) -> Table:
    """A table; columns of numbers are named `>name` and stand to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        side = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, overflow="fold")
    return made


def show_plan(plan: Plan) -> None:
    """Sizes, FLOPs and memory of a build that was not run."""
    sizes = table("Resolutions", "name", ">pixels", ">frames", ">latents", ">tokens", ">PFLOP/step")
    for size in plan.sizes:
        sizes.add_row(
            size.resolution,
            f"{size.height} x {size.width}",
            str(size.frames),
            "x".join(str(dim) for dim in size.latent_shape),
            f"{size.tokens:,}",
            f"{size.flops_per_step / 1e15:.4g}",
        )
    needs = table("Needs", "what", ">needed", ">free")
    needs.add_row("disk", amount(plan.disk_needed_bytes), amount(plan.disk_free_bytes))
    needs.add_row(
        "memory to build", amount(plan.build_memory_bytes), amount(plan.memory_free_bytes)
    )
    needs.add_row("weights file", amount(plan.weights_bytes), "")
    for size in plan.sizes:
        name = size.resolution
        needs.add_row(f"one step's activations, {name}", amount(size.activation_bytes), "")
        if size.attention_scores_bytes:
            scores = amount(size.attention_scores_bytes)
            needs.add_row(f"attention scores on a processor, {name}", scores, "")
        needs.add_row(f"VAE decoding, {name}", amount(size.vae_decode_bytes), "")
    for offload, count in plan.runtime_bytes.items():
        needs.add_row(f"generating, offload={offload}", amount(count), "")
    show_fact("checkpoint", plan.model)
    show_fact("bundle", plan.output)
    show_fact("stages", ", ".join(plan.stages))
    out.print(sizes, needs)


def show_built(bundle: Bundle) -> None:
    """A fresh bundle: what each stage cost, and what to do with it."""
    show_stages(bundle)
    name = bundle.folder
    size = sum(record.bytes for record in bundle.manifest.files.values())
    show_text(f"bundle  {name}  ({amount(size)})")
    show_text(f"next    lcexport inspect {name}")
    if bundle.manifest.backends:
        show_text(f"        lcexport verify {name}")
        show_text(f'        lcexport generate {name} --prompt "..." --out x.mp4')


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
    none = "none run (compiled only)" if manifest.engines else "none (exported only)"
    show_fact("backends", ", ".join(manifest.backends) or none)
    show_fact("versions", listed(manifest.versions))
    for name, graph in manifest.graphs.items():
        if added := graph.added:
            show_fact("added", f"{name} ({added.created}) with {listed(added.versions)}")
    graphs = table("Graphs", "name", ">pixels", ">frames", ">tokens", "file")
    for name, graph in manifest.graphs.items():
        preset = graph.preset
        size = f"{preset.height} x {preset.width}"
        graphs.add_row(name, size, str(preset.frames), f"{preset.tokens:,}", graph.file)
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
    show_stages(bundle)


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
                engine.gpu or ", ".join(engine.compute_capabilities) or "all its targets",
                str(len(engine.plans)),
                str(attentions_of(engine)),
                Text("verified", "green") if engine.verified else Text("not run", "yellow"),
            )
    return rows


def attentions_of(engine: EngineRecord) -> int:
    """Fused attentions of a pass: a plan may be used more than once."""
    uses = [call.plan for call in engine.calls] or range(len(engine.plans))
    return sum(engine.plans[index].attentions for index in uses)


def show_stages(bundle: Bundle) -> None:
    """What each stage of the build cost."""
    stages = table("Build", "stage", ">seconds", ">peak memory")
    for stage in bundle.manifest.stages:
        stages.add_row(stage.name, f"{stage.seconds:.1f}", amount(stage.peak_rss_bytes))
    out.print(stages)


def show_violations(found: Mapping[str, Sequence[Violation]], target: str) -> None:
    """What a target would refuse, graph by graph."""
    for name, violations in found.items():
        if not violations:
            show_text(f"{name}: nothing that {target} would refuse")
        for violation in violations:
            show_text(f"{name}: {violation}")


def show_validation(report: ValidationReport) -> None:
    """A checkpoint's state, and every problem found."""
    facts = table("Checkpoint", "what", "found")
    facts.add_row("folder", report.folder)
    expected = "?" if report.tensors_expected is None else f"{report.tensors_expected:,}"
    facts.add_row("layout", f"{report.layout}, {report.naming or 'unknown'} names")
    facts.add_row("tensors", f"{report.tensors_present:,} of {expected}")
    facts.add_row("parameters", f"{report.parameters:,}")
    facts.add_row("size", amount(report.bytes))
    for dtype, summary in report.dtypes.items():
        facts.add_row(dtype, f"{summary.tensors:,} tensors, {amount(summary.bytes)}")
    for name, size in report.shards.items():
        facts.add_row("file", f"{name}, {amount(size)}")
    facts.add_row("components", ", ".join(report.components_present) or "none")
    if report.components_missing:
        facts.add_row("missing", ", ".join(report.components_missing))
    scan = "not run" if report.nonfinite is None else f"{len(report.nonfinite)} tensors"
    facts.add_row("not finite", scan)
    out.print(facts)
    for warning in report.warnings:
        out.print(f"warning: {warning}", style="yellow")
    for problem in report.problems:
        out.print(f"problem: {problem}", style="red")
    out.print("sound" if report.ok else f"{len(report.problems)} problems", style="bold")


def show_conversion(report: ConvertReport) -> None:
    """What a conversion wrote."""
    facts = table("Converted", "what", "value")
    facts.add_row("folder", str(report.destination))
    facts.add_row("layout", f"{report.layout}, {report.naming} names")
    facts.add_row("weights", f"{report.weights.count:,} tensors, {amount(report.weights.bytes)}")
    facts.add_row("sha256", report.weights.sha256[:16])
    facts.add_row("components", ", ".join(report.copied) or "none")
    checked = "no" if not report.checked else f"{report.checked:,} tensors equal"
    facts.add_row("checked", checked)
    out.print(facts)


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


def show_video(video: Video, path: Path, contact_sheet: Path | None) -> None:
    """Where a video is, and what it took."""
    frames, height, width, _ = video.frames.shape
    show_text(f"{path}  {width} x {height}, {frames} frames at {video.fps:g}/s")
    if contact_sheet:
        show_text(str(contact_sheet))
    show_text(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in video.timings.items()))


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """A machine, what each backend can do on it, and what stands in the way of the rest."""
    facts = diagnosis.facts
    cuda = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    available, total = amount(facts.memory_available_bytes), amount(facts.memory_total_bytes)
    providers = ", ".join(facts.onnxruntime_providers)
    show_fact("lcexport", f"{facts.lcexport}, Python {facts.python}, {facts.platform}")
    show_fact("torch", f"{facts.torch}, {cuda}")
    show_fact("driver", f"up to CUDA {facts.driver_cuda}" if facts.driver_cuda else "none")
    for gpu in facts.gpus:
        show_fact("GPU", gpu_words(gpu))
    if not facts.gpus:
        show_fact("GPU", "none that torch sees")
    show_fact("memory", f"{available} available of {total}")
    show_fact("disk", f"{amount(facts.disk_free_bytes)} free in {facts.disk_folder}")
    show_fact("onnxruntime", f"{facts.onnxruntime or 'does not load'}  {providers}")
    for product in diagnosis.products:
        show_fact(product.name, product_words(product))
    out.print(verdict_table(diagnosis.verdicts))
    show_refusals(diagnosis.verdicts)


def gpu_words(gpu: Gpu) -> str:
    """A GPU's name, kind and memory."""
    free = "unknown" if gpu.free_bytes is None else amount(gpu.free_bytes)
    return f"{gpu.name}, {gpu.compute_capability}, {free} free of {amount(gpu.total_bytes)}"


def product_words(product: Product) -> str:
    """How far one of the TensorRT products gets here."""
    state = product.state
    if not product.installed:
        return "not installed"
    if not product.loads:
        return "crashes" if state.crashed else "installed, does not load"
    if not state.builder:
        return f"{state.version}, loads, cannot make a builder"
    return f"{state.version}, compiles for {', '.join(state.targets) or 'the GPU that is here'}"


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Where each backend builds and runs: the devices, or no."""
    rows = table("Backends", "backend", "precision", "build", "run")
    for backend, precision in dict.fromkeys((v.backend, v.precision) for v in verdicts):
        found: dict[str, list[str]] = {"build": [], "run": []}
        for verdict in verdicts:
            if (verdict.backend, verdict.precision) == (backend, precision) and not verdict.error:
                found[verdict.action].append(verdict.device)
        no = Text("no", "yellow")
        cells = (", ".join(found[action]) or no for action in ("build", "run"))
        rows.add_row(backend, precision, *cells)
    return rows


def show_refusals(verdicts: Sequence[Verdict]) -> None:
    """Each reason once, after all that it stands in the way of."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.error is not None:
            key = (f"{verdict.backend} {verdict.precision}", str(verdict.error))
            reasons.setdefault(key, []).append(f"{verdict.action} on {verdict.device}")
    for (engine, reason), barred in reasons.items():
        show_text(f"no {engine} ({', '.join(barred)}):")
        show_text(f"    {reason}")


def found_and_wanted(check: Check, above: str) -> str:
    """What a check measured, and under it the threshold, unless the row above has the same."""
    measured = {name: value for name, value in check.got.items() if name != "mean_abs"}
    found = "  ".join(f"{name} {value:.3g}" for name, value in measured.items())
    wanted = check.wanted if check.ok is None else f"wanted {check.wanted}"
    text = "\n".join(filter(None, (found, "" if check.wanted == above else wanted)))
    return re.sub(r"\w+", lambda word: SHORT.get(word[0], word[0]), text)


def listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def amount(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
