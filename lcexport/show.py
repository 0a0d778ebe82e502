"""Results for people: tables on standard output. Knows nothing of how they were made."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lcexport.builder import Plan
from lcexport.checkpoint import ConvertReport, ValidationReport
from lcexport.doctor import Diagnosis, Gpu, Product, Verdict
from lcexport.engines.bundle import Bundle, EngineRecord
from lcexport.graph.check import Violation
from lcexport.runtime import Video
from lcexport.verify import Check, Report

PLAIN_WIDTH = 140  # where the output is no terminal
NEXT_LINE = "\n" + 14 * " "
SHORT = {"max_abs": "max", "mean_abs": "mean", "relative_l2": "l2", "cosine": "cos"}

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def show_json(document: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def table(title: str, *columns: str) -> Table:
    """A table whose first column is left-aligned text and whose others are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made


def show_plan(plan: Plan) -> None:
    """Sizes, FLOPs and memory of a build that was not run."""
    sizes = table("Resolutions", "name", "pixels", "frames", "latents", "tokens", "PFLOP/step")
    for size in plan.sizes:
        sizes.add_row(
            size.resolution,
            f"{size.height} x {size.width}",
            str(size.frames),
            "x".join(str(dim) for dim in size.latent_shape),
            f"{size.tokens:,}",
            f"{size.flops_per_step / 1e15:.4g}",
        )
    needs = table("Needs", "what", "needed", "free")
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
    out.print(f"checkpoint  {plan.model}\nbundle      {plan.output}")
    out.print(f"stages      {', '.join(plan.stages)}")
    out.print(sizes, needs)


def show_built(bundle: Bundle) -> None:
    """A fresh bundle: what each stage cost, and what to do with it."""
    show_stages(bundle)
    name = bundle.folder
    size = sum(record.bytes for record in bundle.manifest.files.values())
    out.print(f"bundle  {name}  ({amount(size)})", highlight=False)
    out.print("next    lcexport inspect", name, highlight=False)
    if bundle.manifest.backends:
        out.print("        lcexport verify", name, highlight=False)
        out.print(f'        lcexport generate {name} --prompt "..." --out x.mp4', highlight=False)


def show_bundle(bundle: Bundle) -> None:
    """A bundle's manifest."""
    manifest = bundle.manifest
    source = manifest.source
    none = "none run (compiled only)" if manifest.engines else "none (exported only)"
    out.print(
        f"bundle      {bundle.folder} (schema {manifest.schema_version}, {manifest.created})\n"
        f"source      {source.layout}, {source.tensors} tensors, {source.dtype}, "
        f"sha256 {source.tensors_sha256[:16]}\n"
        f"precision   {manifest.precision}, islands {manifest.islands}\n"
        f"backends    {', '.join(manifest.backends) or none}\n"
        f"versions    {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}"
    )
    graphs = table("Graphs", "name", "pixels", "frames", "tokens", "file")
    for name, graph in manifest.graphs.items():
        preset = graph.preset
        size = f"{preset.height} x {preset.width}"
        graphs.add_row(name, size, str(preset.frames), f"{preset.tokens:,}", graph.file)
    files = table("Files", "file", "size", "sha256")
    for name, record in manifest.files.items():
        files.add_row(name, amount(record.bytes), record.sha256[:16])
    proofs = table("Precision proof", "graph", "checked", "count")
    for name, graph in manifest.graphs.items():
        for fact, count in graph.precision_proof.items():
            proofs.add_row(name, fact.replace("_", " "), f"{count:,}")
    out.print(graphs, proofs, files)
    if manifest.engines:
        out.print(engines_table(manifest.engines))
    show_stages(bundle)


def engines_table(engines: Mapping[str, Mapping[str, EngineRecord]]) -> Table:
    """What was compiled, by what, for which GPUs, and whether it ever ran."""
    names = ("backend", "resolution", "compiled by", "for", "plans", "attentions", "against eager")
    rows = table("Engines", *names)
    for backend, compiled in engines.items():
        for resolution, engine in compiled.items():
            rows.add_row(
                backend,
                resolution,
                f"{engine.product} {engine.version}",
                engine.gpu or ", ".join(engine.compute_capabilities) or "all its targets",
                str(len(engine.plans)),
                str(sum(plan.attentions for plan in engine.plans)),
                "[green]verified[/]" if engine.verified else "[yellow]not run[/]",
            )
    return rows


def show_stages(bundle: Bundle) -> None:
    """What each stage of the build cost."""
    stages = table("Build", "stage", "seconds", "peak memory")
    for stage in bundle.manifest.stages:
        stages.add_row(stage.name, f"{stage.seconds:.1f}", amount(stage.peak_rss_bytes))
    out.print(stages)


def show_violations(found: Mapping[str, Sequence[Violation]], target: str) -> None:
    """What a target would refuse, graph by graph."""
    for name, violations in found.items():
        if not violations:
            out.print(f"{name}: nothing that {target} would refuse", highlight=False)
        for violation in violations:
            out.print(f"{name}: {violation}", markup=False, highlight=False)


def show_validation(report: ValidationReport) -> None:
    """A checkpoint's state, and every problem found."""
    facts = table(f"Checkpoint {report.folder}", "what", "found")
    expected = "?" if report.tensors_expected is None else f"{report.tensors_expected:,}"
    facts.add_row("layout", f"{report.layout}, {report.naming or 'unknown'} names")
    facts.add_row("tensors", f"{report.tensors_present:,} of {expected}")
    facts.add_row("parameters", f"{report.parameters:,}")
    facts.add_row("size", amount(report.bytes))
    for dtype, summary in report.dtypes.items():
        facts.add_row(dtype, f"{summary.tensors:,} tensors, {amount(summary.bytes)}")
    for name, size in report.shards.items():
        facts.add_row(name, amount(size))
    facts.add_row("components", ", ".join(report.components_present) or "none")
    if report.components_missing:
        facts.add_row("components missing", ", ".join(report.components_missing))
    scan = "not run" if report.nonfinite is None else f"{len(report.nonfinite)} tensors"
    facts.add_row("NaN or infinity", scan)
    out.print(facts)
    for problem in report.problems:
        out.print(f"problem: {problem}", style="red", markup=False, highlight=False)
    out.print("sound" if report.ok else f"{len(report.problems)} problems", style="bold")


def show_conversion(report: ConvertReport) -> None:
    """What a conversion wrote."""
    facts = table(f"Converted to {report.destination}", "what", "value")
    facts.add_row("layout", f"{report.layout}, {report.naming} names")
    facts.add_row("weights", f"{report.weights.count:,} tensors, {amount(report.weights.bytes)}")
    facts.add_row("sha256", report.weights.sha256)
    facts.add_row("components", ", ".join(report.copied) or "none")
    checked = "no" if not report.checked else f"{report.checked:,} tensors equal"
    facts.add_row("checked", checked)
    out.print(facts)


def show_verification(report: Report) -> None:
    """Every row of a verification, a table for each level."""
    for level in dict.fromkeys(check.level for check in report.checks):
        rows = table(f"{level}", "check", "on", "found", "wanted", "")
        for check in report.checks:
            if check.level == level:
                rows.add_row(*check_cells(check))
        out.print(rows)
    failed = len(report.failed)
    skipped = sum(check.ok is None for check in report.checks)
    verdict = "verified" if report.ok else f"{failed} checks failed"
    out.print(verdict + (f", {skipped} not run" if skipped else ""), style="bold")


def show_video(video: Video, path: Path, contact_sheet: Path | None) -> None:
    """Where a video is, and what it took."""
    frames, height, width, _ = video.frames.shape
    out.print(f"{path}  {width} x {height}, {frames} frames at {video.fps:g}/s", highlight=False)
    if contact_sheet:
        out.print(str(contact_sheet), highlight=False)
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in video.timings.items())
    out.print(spent, highlight=False)


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """A machine, what each backend can do on it, and what stands in the way of the rest."""
    facts = diagnosis.facts
    cuda = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    driver = f"up to CUDA {facts.driver_cuda}" if facts.driver_cuda else "none"
    available, total = amount(facts.memory_available_bytes), amount(facts.memory_total_bytes)
    providers = ", ".join(facts.onnxruntime_providers)
    out.print(
        f"lcexport      {facts.lcexport}, Python {facts.python}, {facts.platform}\n"
        f"torch         {facts.torch}, {cuda}\n"
        f"driver        {driver}\n"
        f"GPU           {NEXT_LINE.join(map(gpu_words, facts.gpus)) or 'none that torch sees'}\n"
        f"memory        {available} available of {total}\n"
        f"disk          {amount(facts.disk_free_bytes)} free in {facts.disk_folder}\n"
        f"onnxruntime   {facts.onnxruntime or 'does not load'}  {providers}",
        highlight=False,
    )
    for product in diagnosis.products:
        out.print(f"{product.name:13} {product_words(product)}", highlight=False)
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
        cells = (", ".join(found[action]) or "[yellow]no[/]" for action in ("build", "run"))
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
        out.print(f"no {engine} ({', '.join(barred)}):", highlight=False)
        out.print(f"    {reason}", markup=False, highlight=False)


def check_cells(check: Check) -> tuple[str, ...]:
    """The cells of one row."""
    got = "  ".join(f"{SHORT.get(name, name)} {value:.3g}" for name, value in check.got.items())
    verdict = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[yellow]not run[/]"}[check.ok]
    place = " ".join(part for part in (check.backend, check.resolution) if part)
    wanted = check.wanted
    for name, short in SHORT.items():
        wanted = wanted.replace(name, short)
    return check.name, place, got, wanted, verdict


def amount(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
