"""The whole qualification: an engine where there is none, every check, two files."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lcexport.builder import build, options_from
from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.configs.tasks import build_words, task_in
from lcexport.doctor import advised
from lcexport.engines import COMPILED, TENSORRT, require_backend
from lcexport.engines.bundle import Bundle
from lcexport.engines.files import refuse_existing, resource_errors, write_bytes
from lcexport.engines.host import release
from lcexport.engines.manifest import read_manifest
from lcexport.machine import environment
from lcexport.qualify import bisect, costs, exactness, files, fusion, speed
from lcexport.qualify.claims import Check, Result, results_of, untested
from lcexport.qualify.page import page
from lcexport.qualify.subject import Subject

SCHEMA_VERSION = 1
JSON_FILE = "qualification.json"
PAGE_FILE = "qualification.md"
BUNDLE_FOLDER = "bundle"
CHECKS: tuple[Check, ...] = (
    *files.CHECKS,
    *fusion.CHECKS,
    *exactness.CHECKS,
    *speed.CHECKS,
    *costs.CHECKS,
)

OnResult = Callable[[Result], None]
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Qualification:
    """What was found of one engine, claim by claim. `complete` once every check has run."""

    subject: dict[str, object]
    environment: dict[str, object]
    results: tuple[Result, ...]
    complete: bool

    @property
    def refuted(self) -> list[Result]:
        return [result for result in self.results if result.verdict == "refuted"]

    @property
    def faults(self) -> list[Result]:
        """The results of checks that broke: faults of lcexport, not of the engine."""
        return [result for result in self.results if "traceback" in result.got]

    def counts(self) -> dict[str, int]:
        return dict(Counter(result.verdict for result in self.results))

    def as_dict(self) -> dict[str, object]:
        return {
            "schema_version": SCHEMA_VERSION,
            "complete": self.complete,
            "subject": self.subject,
            "environment": self.environment,
            "verdicts": self.counts(),
            "claims": [result.as_dict() for result in self.results],
        }


def qualify(
    folder: Path,
    output: Path,
    *,
    backend: str | None = None,
    resolution: str | None = None,
    device: str = "cuda",
    model: Path | None = None,
    bisecting: bool = False,
    on_result: OnResult | None = None,
    on_progress: OnProgress | None = None,
) -> Qualification:
    """Put every claim about one engine of a bundle to the test, and write what was found.

    The JSON grows with each check, so that an interrupted qualification leaves what it found.

    Args:
        output: a new folder, for `qualification.json`, `qualification.md` and what checks leave.
        backend: the bundle's first compiled engine by default, else the first it was built with.
        resolution: the bundle's first by default.
        model: a checkpoint, to build the engine from where the bundle has none.
        bisecting: also look for the first block outside the tolerance.

    Raises:
        IncompatibleError: the backend, the device or Polygraphy is not to be had here.
        UsageError: the bundle has no such engine, and no checkpoint was named.
        ResourceError: `output` exists.
    """
    bundle = Bundle(folder, read_manifest(folder))
    manifest = bundle.manifest
    backend = backend or next(iter(manifest.engines), None) or manifest.default_backend
    resolution = resolution or next(iter(manifest.graphs))
    refuse_existing(output)
    require(bundle, backend, resolution, device, buildable=model is not None)
    if bisecting:
        bisect.require_polygraphy()
    with resource_errors(output):
        output.mkdir()
    if not has_engine(bundle, backend, resolution):
        assert model is not None
        bundle = built(bundle, backend, resolution, device, model, output, on_progress)
    subject = Subject(bundle, resolution, backend, torch.device(device), output)
    return run_checks(subject, bisecting, on_result or (lambda result: None))


def has_engine(bundle: Bundle, backend: str, resolution: str) -> bool:
    """Whether there is something to run: a compiled engine, or the graph for the others."""
    if backend in COMPILED:
        return resolution in bundle.manifest.engines.get(backend, {})
    return resolution in bundle.manifest.graphs


def require(bundle: Bundle, backend: str, resolution: str, device: str, *, buildable: bool) -> None:
    """Refuse at once what no check could do anything about."""
    try:
        require_backend(backend, bundle.manifest.precision, device)
        require_gpu(backend, device)
    except IncompatibleError as error:
        raise advised(error) from error
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device",
            do="Use a machine with a GPU; --device cpu runs what needs none.",
        )
    if not buildable and not has_engine(bundle, backend, resolution):
        command = build_command(bundle, backend, resolution, device, "CHECKPOINT")
        raise UsageError(
            f"the bundle {bundle.folder} has no {backend} engine for {resolution}",
            do=f"Name a checkpoint with --model to have one built, or build it: {command}",
        )


def build_command(bundle: Bundle, backend: str, name: str, device: str, model: str) -> str:
    """What to type for a bundle with the engine of a graph, made as this bundle's are.

    Args:
        name: of the graph, whether the bundle has it or not.
    """
    resolution, task, _ = task_in(name)
    options = bundle.manifest.options_for(resolution, task)
    words = ["lcexport", "build", "--model", model, *build_words(resolution, task, options)]
    return shlex.join([*words, "--backend", backend, "--device", device, "-o", "NEW"])


def require_gpu(backend: str, device: str) -> None:
    """TensorRT's engines run on GPUs only; on a processor each claim about one would be refuted."""
    if backend in TENSORRT and torch.device(device).type == "cpu":
        raise IncompatibleError(
            f"{backend} engines run on NVIDIA GPUs",
            got=f"device {device}",
            do="Name another --backend, or use --device cuda.",
        )


def built(
    bundle: Bundle,
    backend: str,
    resolution: str,
    device: str,
    model: Path,
    output: Path,
    on_progress: OnProgress | None,
) -> Bundle:
    """A bundle like this one with the engine it lacks, in the report's folder."""
    manifest = bundle.manifest
    name, task, _ = task_in(resolution)
    if task != "t2v":
        raise UsageError(
            "only text-to-video's engine is built on the way",
            got=resolution,
            do=f"Build it: {build_command(bundle, backend, resolution, device, str(model))}",
        )
    made = manifest.options_for(name, task)
    options = options_from(
        model=model,
        res=resolution,
        output=output / BUNDLE_FOLDER,
        backends=backend,
        device=device,
        precision=manifest.precision,
        islands=manifest.islands,
        weights_dtype=manifest.weights_dtype,
        dense=made.get("dense", False),
        batch=made["batch"],
    )
    return build(options, on_progress)


def run_checks(subject: Subject, bisecting: bool, on_result: OnResult) -> Qualification:
    """Every check in its order; the JSON after each, the page at the end."""
    described, machine = description(subject), environment(subject.device, [subject.backend])
    results: list[Result] = []
    for found in all_results(subject, bisecting):
        for result in found:
            on_result(result)
        results += found
        so_far = Qualification(described, machine, tuple(results), complete=False)
        write(subject.folder / JSON_FILE, so_far)
    whole = Qualification(described, machine, tuple(results), complete=True)
    write(subject.folder / JSON_FILE, whole)
    write_bytes(subject.folder / PAGE_FILE, page(whole.as_dict()).encode())
    return whole


def all_results(subject: Subject, bisecting: bool) -> Iterator[list[Result]]:
    """The results of each check. Nothing of a damaged bundle is opened."""
    damaged = False
    for check in (*CHECKS, *bisect.CHECKS):
        if damaged:
            yield [untested(claim, "the bundle is damaged") for claim in check.claims]
        elif check in bisect.CHECKS and not bisecting:
            yield [untested(claim, "--bisect was not given") for claim in check.claims]
        else:
            found = results_of(check, subject)
            damaged = any(r.claim is files.FILES and r.verdict == "refuted" for r in found)
            release()
            yield found


def description(subject: Subject) -> dict[str, object]:
    """Which engine of which bundle, in the manifest's words."""
    manifest, record = subject.bundle.manifest, subject.engine_record
    return {
        "bundle": subject.bundle.folder.name,
        "source": manifest.source.model_dump(mode="json"),
        "precision": manifest.precision,
        "islands": manifest.islands,
        "resolution": subject.resolution,
        "tokens": subject.record.job.tokens,
        "batch": subject.record.batch,
        "backend": subject.backend,
        "device": str(subject.device),
        "engine": record.model_dump(mode="json") if record else None,
    }


def write(path: Path, found: Qualification) -> None:
    """The JSON so far, in place of the one before."""
    write_bytes(path, (json.dumps(found.as_dict(), indent=1) + "\n").encode(), replace=True)
