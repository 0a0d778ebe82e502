"""What each task of the released model costs at a matrix product's speed: operations over rates.

    python benchmarks/roofline.py [--tflops 790] [--bandwidth 4.8] [--plot FILE.png] [--json FILE]

Nothing is measured here: operations come from `lcexport.flops`, as `lcexport plan` shows them, and
weights' bytes from the configuration. The default rates are an H200's: 790 TFLOP/s is what a large
bfloat16 matrix product was measured to reach on one (not by this project), of 989 on its data
sheet; 4.8 TB/s its data sheet's bandwidth (an H100's is 3.35 TB/s, with the same arithmetic units).
So a time is what the task would take if all of it ran at the speed of a large matrix product. Text
encoder and VAE are not in it.

Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcexport.builder.plan import weights_bytes
from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import Job, jobs_for
from lcexport.flops import job_flops
from lcexport.runtime.schedule import refine_schedule

DISTILLED_STEPS = 16
# The configuration's defaults are the released model's; its block-sparse parameters too.
RELEASED = DiTConfig(bsa_params=BlockSparseParams())
# Task, whether its attention is block-sparse, and whether it stands for the distilled schedule.
ROWS = (
    ("t2v", False, False),
    ("t2v", False, True),
    ("i2v", False, False),
    ("vc", False, False),
    ("vc-uncached", False, False),
    ("refine", False, False),
    ("refine", True, False),
)


def rows(size: str, tflops: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One row for each graph of each task at this size."""
    config, preset = RELEASED, preset_from(size)
    weights = weights_bytes(config, "bf16")
    for task, sparse, distilled in ROWS:
        if task == "refine" and size != "480p":
            continue
        for job in jobs_for(preset, task, sparse=sparse):  # pyright: ignore[reportArgumentType]
            calls = calls_of(job, distilled)
            work = job_flops(config, job).total
            yield {
                "graph": job.name + (" sparse" if sparse else "") + (" 16 steps" * distilled),
                "tokens": job.tokens,
                "pflop_per_call": work / 1e15,
                "calls": calls,
                "seconds_per_call": work / (tflops * 1e12),
                "seconds_to_read_weights": weights / (bandwidth * 1e12),
                "seconds_per_video": calls * max(
                    work / (tflops * 1e12), weights / (bandwidth * 1e12)
                ),
            }  # fmt: skip


def calls_of(job: Job, distilled: bool) -> int:
    """Passes of one sample through the graph for one video: steps times branches."""
    if job.part == "cache":
        return 1
    if job.refinement is not None:
        return refine_schedule(job.preset.steps).steps
    return DISTILLED_STEPS if distilled else 2 * job.preset.steps


def show(report: dict[str, Any]) -> None:
    print(f"at {report['tflops']:g} TFLOP/s and {report['bandwidth_tb_s']:g} TB/s")
    print(f"{'graph':<28}{'tokens':>9}{'PFLOP':>9}{'s a call':>10}{'calls':>7}{'s a video':>11}")
    for row in report["rows"]:
        print(
            f"{row['graph']:<28}{row['tokens']:>9,}{row['pflop_per_call']:>9.3f}"
            f"{row['seconds_per_call']:>10.3f}{row['calls']:>7}{row['seconds_per_video']:>11.1f}"
        )
    print(f"reading the weights once: {report['rows'][0]['seconds_to_read_weights'] * 1e3:.1f} ms")


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds for one video as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [row["graph"] for row in report["rows"]][::-1]
    values = [row["seconds_per_video"] for row in report["rows"]][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(labels) + 1.2), layout="constrained")
    axes.bar_label(axes.barh(labels, values), fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlabel(f"seconds for one video, computed for {report['tflops']:g} TFLOP/s")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tflops", type=float, default=790.0, help="of a bfloat16 matrix product")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of device memory, TB/s")
    parser.add_argument("--plot", type=Path, help="draw the seconds as bars; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args(arguments)
    report = {
        "schema_version": 1,
        "benchmark": "roofline",
        "tflops": asked.tflops,
        "bandwidth_tb_s": asked.bandwidth,
        "rows": [
            row
            for size in ("480p", "720p")
            for row in rows(size, asked.tflops, asked.bandwidth)
        ],
    }  # fmt: skip
    show(report)
    if asked.plot:
        draw(report, asked.plot)
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
