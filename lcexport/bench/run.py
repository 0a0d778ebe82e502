"""One run of `bench`: refuse what cannot be, measure, compare, draw."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcexport.bench.compare import Document, changes, check_comparable, limit_from, read_old
from lcexport.bench.plot import check_plot, save_plot
from lcexport.bench.steps import measure_steps
from lcexport.bench.subject import Contestant, Subject
from lcexport.configs.errors import LcexportError, UsageError
from lcexport.engines.trt.worker import child_environment, error_from
from lcexport.machine import device_facts, environment

SCHEMA_VERSION = 1
MAX_REGRESSION = 0.08  # a share
COMMAND = (sys.executable, "-P", "-m", "lcexport.bench.service")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # what torch.compile leaves behind
MOST_STEPS, MOST_REPEATS, MOST_REQUESTS = 1000, 1000, 1000

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How much is measured: `steps` guided steps in each of `repeats` rounds, whole `requests`;
    and whether text encoder and VAE are the library's where the bundle has compiled ones.
    """

    steps: int = 2
    repeats: int = 5
    requests: int = 2
    library_components: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "steps": (1, MOST_STEPS), "repeats": (1, MOST_REPEATS), "requests": (0, MOST_REQUESTS)
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(f"{name} is out of range", got=value, wanted=f"{least}..{most}")


@dataclass(frozen=True)
class Outputs:
    """What becomes of the figures, beside the document: a picture, a comparison."""

    plot: Path | None = None
    old: Document | None = None
    limit: float = MAX_REGRESSION


def outputs_from(plot: Path | None, compare: Path | None, max_regression: str | None) -> Outputs:
    """Check what can be checked before there is a bundle.

    Raises:
        UsageError: no .png, no percentage, or a limit without an earlier run.
        ResourceError: the picture exists.
        InputError, IncompatibleError: the earlier run cannot be used; matplotlib is missing.
    """
    if max_regression is not None and compare is None:
        raise UsageError("--max-regression is a limit to --compare", do="Name an earlier run.")
    limit = MAX_REGRESSION if max_regression is None else limit_from(max_regression)
    if plot:
        check_plot(plot)
    return Outputs(plot, read_old(compare, SCHEMA_VERSION) if compare else None, limit)


def bench(
    subject: Subject,
    options: Options,
    outputs: Outputs,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure every contestant, and say how it compares: the document that `--json` prints.

    Raises:
        IncompatibleError: the earlier run is no measure for this one; before anything is measured.
        LcexportError: a contestant failed.
    """
    show = on_progress or (lambda what, done, total: None)
    document = described(subject, options)
    if outputs.old is not None:
        check_comparable(outputs.old, document)
    steps, document["order"] = measure_steps(
        subject, options.steps, options.repeats, lambda done, of: show("steps in turn", done, of)
    )
    for done, contestant in enumerate(subject.contestants):
        show("each in a process", done, len(subject.contestants))
        one = document["contestants"][done]
        one |= steps[contestant.name] | served(contestant, subject, options)
        one["files"] = contestant.files(subject.device)
    show("each in a process", len(subject.contestants), len(subject.contestants))
    if outputs.old is not None:
        found = changes(outputs.old, document, outputs.limit)
        document["comparison"] = {
            "max_regression": outputs.limit,
            "changes": [asdict(change) for change in found],
        }
    if outputs.plot:
        save_plot(document, outputs.plot)
    return document


def described(subject: Subject, options: Options) -> dict[str, Any]:
    """The document before anything is measured."""
    flops = subject.flops
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "bench",
        "subject": subject.facts(),
        "device": device_facts(subject.device),
        "options": asdict(options),
        "environment": environment(subject.device, {c.runs for c in subject.contestants}),
        "operations": {
            "pass": flops.total,
            "step": flops.total * subject.branches,
            "kinds": asdict(flops),
            "saved_by_sparsity": subject.flops_saved,
        },
        "contestants": [contestant.facts() for contestant in subject.contestants],
    }


def served(contestant: Contestant, subject: Subject, options: Options) -> dict[str, Any]:
    """Start `service` for one contestant and wait for its figures.

    What was compiled here before, for the steps in turn, is hidden from it: it starts cold.

    Raises:
        LcexportError: the process' own error under the contestant's name, of its own class; or it
            ended without a word of one: says the last thing it said.
    """
    request = {
        "folder": str(contestant.bundle.folder.absolute()),
        "resolution": subject.job.preset.name,
        "task": subject.job.task,
        "backend": contestant.backend,
        "device": str(subject.device),
        "steps": options.steps,
        "repeats": options.repeats,
        "requests": options.requests,
        "library_components": options.library_components,
        "started": time.monotonic(),
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        folders = {name: f"{caches}/{name}" for name in CACHES}
        done = subprocess.run(
            [*COMMAND, json.dumps(request)],
            env=child_environment() | folders,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise LcexportError(
            f"{contestant.name} failed in a process of its own",
            got=f"status {done.returncode}: {said[-1]}",
        )
    got = json.loads(done.stdout.splitlines()[-1])
    if error := got.get("error"):
        raise error_from({**error, "what": f"{contestant.name}: {error['what']}"})
    return got


def regressions(document: Document) -> list[str]:
    """The figures that are worse than was allowed, in words."""
    found = document.get("comparison", {}).get("changes", [])
    return [
        f"{one['contestant']} {one['metric']} {one['change']:+.1%}"
        for one in found
        if one["regressed"]
    ]
