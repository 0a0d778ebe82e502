"""The bundle is what its manifest says, and the engine computes what eager torch computes.

The levels of `lcexport.verify`, each a claim; this file adds no check of its own.
"""

from collections.abc import Callable, Iterable, Iterator

from lcexport.engines.manifest import COMPONENTS
from lcexport.qualify.claims import Check, Claim, Result, judged, untested
from lcexport.qualify.subject import Subject
from lcexport.verify.levels import hash_level, load_level, module_level, step_level, video_level
from lcexport.verify.report import Check as Row

FILES = Claim(
    "files",
    "Every file of the bundle is the one its manifest names.",
    "SHA-256 of each file against the manifest (`verify --level hash`).",
)
PORTS = Claim(
    "ports",
    "The engine takes and gives the tensors that the manifest names.",
    "The opened engine's names, shapes and types against the manifest (`verify --level load`).",
)
MODULES = Claim(
    "modules",
    "Each call of the graph computes what the torch module it was traced from computes.",
    "Every call on its own in ONNX Runtime, with torch's inputs (`verify --level module`).",
)
STEP = Claim(
    "step",
    "One forward pass agrees with eager torch.",
    "The bundle's golden inputs, both branches of the guidance, against eager's stored outputs, "
    "and six diagnostics (`verify --level step`).",
)
VIDEO = Claim(
    "video",
    "A short generation agrees with eager torch's.",
    "Latents after each of four guided steps, and the frames (`verify --level video`).",
)

Rows = Callable[[Subject], Iterable[Row]]
Needs = Callable[[Subject], str]


def result_from(claim: Claim, rows: Iterable[Row]) -> Result:
    """Rows of `verify` as one result: refuted by one that failed, not tested where none ran."""
    rows = list(rows)
    ran = [row for row in rows if row.ok is not None]
    if not ran:
        return untested(claim, "; ".join(row.wanted for row in rows) or "nothing to check")
    failed = [row.name for row in ran if not row.ok]
    got: dict[str, object] = {row.name: row.got for row in ran}
    threshold = "; ".join(dict.fromkeys(row.wanted for row in ran))
    why = f"outside: {', '.join(failed)}" if failed else ""
    return judged(claim, not failed, threshold, got, why)


def nothing(subject: Subject) -> str:
    return ""


def golden(subject: Subject) -> str:
    """What is lacking where the bundle has no golden data."""
    lacks = subject.record.golden is None
    return "the bundle has no golden data: build it without --only" if lacks else ""


def components(subject: Subject) -> str:
    """What is lacking where the bundle cannot make a video."""
    parts = {name.partition("/")[0] for name in subject.bundle.manifest.files}
    missing = [name for name in COMPONENTS if name not in parts]
    return f"the bundle was made without {', '.join(missing)}" if missing else ""


def level(claim: Claim, rows: Rows, lacking: Needs = nothing) -> Check:
    """A level of `verify` as a check, for bundles that lack nothing it needs."""

    def run(subject: Subject) -> Iterator[Result]:
        if why := lacking(subject):
            yield untested(claim, why)
        else:
            yield result_from(claim, rows(subject))

    return Check((claim,), run)


def opened(subject: Subject) -> Iterable[Row]:
    return [load_level(subject.bundle, subject.resolution, subject.backend, str(subject.device))]


def step(subject: Subject) -> Iterable[Row]:
    return step_level(subject.bundle, subject.resolution, subject.backend, str(subject.device))


def video(subject: Subject) -> Iterable[Row]:
    backends = (subject.backend,)
    return video_level(subject.bundle, subject.resolution, backends, str(subject.device))


CHECKS = (
    level(FILES, lambda subject: hash_level(subject.bundle)),
    level(PORTS, opened),
    level(MODULES, lambda s: module_level(s.bundle, s.resolution), golden),
    level(STEP, step, golden),
    level(VIDEO, video, components),
)
