"""A checkpoint, and what a conversion wrote."""

from lcexport.checkpoint import ConvertReport, ValidationReport
from lcexport.show.console import amount, out, table


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
