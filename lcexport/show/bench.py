"""What a run of `bench` found."""

from collections.abc import Mapping
from typing import Any

from lcexport.show.console import amount, out, show_fact, show_text, table

Document = Mapping[str, Any]


def show_bench(document: Document) -> None:
    """The figures as tables."""
    show_subject(document)
    contestants = document["contestants"]
    steps = table(
        f"Guided step, {document['order']}",
        "contestant", ">min", ">median", ">p90", ">max", ">outside", ">TFLOP/s", ">share",
    )  # fmt: skip
    for one in contestants:
        steps.add_row(
            one["name"],
            *(seconds(one["step"][f"{name}_seconds"]) for name in ("min", "median", "p90", "max")),
            f"{one['outside_share']:.2%}",
            f"{one['operations_per_second'] / 1e12:.3g}",
            f"{one['share_of_matrix_products']:.0%}",
        )
    out.print(steps)
    stages = table(
        "Stages (medians), and a service", "contestant", ">load", ">cold start", ">text",
        ">cache", ">decode", ">request", ">per hour",
    )  # fmt: skip
    for one in contestants:
        medians = (median(one, name) for name in ("text", "cache", "decode", "requests"))
        per_hour = one.get("requests_per_hour")
        stages.add_row(
            one["name"], seconds(one["load_seconds"]), seconds(one["cold_start_seconds"]),
            *medians, "" if per_hour is None else f"{per_hour:.3g}",
        )  # fmt: skip
    out.print(stages)
    sizes = table("Memory at most, and files", "contestant", ">host", ">device", ">files")
    for one in contestants:
        device = one.get("device_peak_bytes")
        sizes.add_row(
            one["name"], amount(one["host_peak_bytes"]),
            "" if device is None else amount(device), amount(one["files"]["total_bytes"]),
        )  # fmt: skip
    out.print(sizes)
    if "comparison" in document:
        show_comparison(document["comparison"])


def show_subject(document: Document) -> None:
    """What was measured, and where."""
    subject, device, operations = (document[n] for n in ("subject", "device", "operations"))
    shape = "x".join(map(str, subject["latent_shape"]))
    show_fact("subject", f"{subject['task']}, latents {shape}, {subject['tokens']:,} tokens")
    threads = f", {device['torch_threads']} threads for torch" if device["type"] == "cpu" else ""
    show_fact("device", f"{device['name']}{threads}")
    passes = subject["passes_per_step"]
    counted = f"{operations['step'] / 1e12:.4g} TFLOP a step ({passes} passes of one sample)"
    saved = operations["saved_by_sparsity"]
    less = "" if saved is None else f", {saved:.0%} saved by block-sparse attention"
    show_fact("operations", counted + less)
    peaks = {one["matrix_product_operations_per_second"] for one in document["contestants"]}
    show_fact(
        "products", ", ".join(f"{peak / 1e12:.3g} TFLOP/s" for peak in sorted(peaks)) + " alone"
    )


def show_comparison(comparison: Document) -> None:
    """Every figure then and now."""
    limit = comparison["max_regression"]
    rows = table(
        f"Against the earlier run (at most {limit:.1%} more)", "contestant", "figure", ">then",
        ">now", ">change", "",
    )  # fmt: skip
    for one in comparison["changes"]:
        written = amount if is_bytes(one["metric"]) else seconds
        then, now = (written(int(v) if is_bytes(one["metric"]) else v)
                     for v in (one["old"], one["new"]))  # fmt: skip
        verdict = "worse" if one["regressed"] else ""
        rows.add_row(one["contestant"], one["metric"], then, now, f"{one['change']:+.1%}", verdict)
    out.print(rows)
    if not comparison["changes"]:
        show_text("no figure in common")


def is_bytes(metric: str) -> bool:
    return metric.endswith("memory") or metric == "files"


def median(contestant: Document, name: str) -> str:
    """A stage's median; nothing where it was not measured."""
    found = contestant.get(name)
    return seconds(found["median_seconds"]) if found else ""


def seconds(value: float) -> str:
    """A duration in three figures."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
