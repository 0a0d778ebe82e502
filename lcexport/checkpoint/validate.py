"""Everything there is to say about a checkpoint folder, sound or not, in one report."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lcexport.checkpoint.checks import tensor_problems
from lcexport.checkpoint.components import component_errors, component_weights
from lcexport.checkpoint.int8 import SCALE, stored_tensors
from lcexport.checkpoint.layout import Layout, Survey, survey
from lcexport.checkpoint.names import Naming
from lcexport.checkpoint.scan import Progress, ScanReport, check_scales, scan_tensors
from lcexport.checkpoint.shards import some
from lcexport.configs.errors import InputError
from lcexport.engines.header import TensorInfo
from lcexport.engines.manifest import COMPONENTS

DIT = "DiT"
MAX_DEPTH = 10_000  # beyond it the configuration is nonsense and its tensors are not enumerated


@dataclass(frozen=True)
class DtypeSummary:
    """How many tensors and bytes one dtype has."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class ValidationReport:
    """The state of a checkpoint. `ok` is: no problems. Missing components are not a problem.

    `warnings` do not make it unsound. `nonfinite` lists the tensors with NaN or infinity, those of
    a component as `vae/NAME`; None when the weights were not scanned. Counts, bytes, `shards` (file
    name -> bytes) and `tensors_sha256` (as in a WriteReport, None unscanned) are the DiT's.
    """

    folder: str
    layout: Layout
    naming: Naming | None
    ok: bool
    problems: list[str]
    warnings: list[str]
    tensors_present: int
    tensors_expected: int | None
    parameters: int
    bytes: int
    dtypes: dict[str, DtypeSummary]
    shards: dict[str, int]
    components_present: list[str]
    components_missing: list[str]
    nonfinite: list[str] | None
    tensors_sha256: str | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def validate(
    folder: str | Path, *, scan: bool = True, on_progress: Progress | None = None
) -> ValidationReport:
    """Check a checkpoint folder and report all that is wrong instead of the first thing.

    Args:
        folder: the checkpoint, of any layout.
        scan: also read every weight, the components' too, for NaN, infinity and unreadable places.
        on_progress: called with bytes scanned and in total.

    Raises:
        InputError: there is no checkpoint at all.
    """
    found = survey(folder)
    tensors = found.weights.tensors
    problems = [str(error) for error in found.errors] + _size_problems(found)
    # with a shard unread, every tensor of it would look like a contradiction of the configuration
    if found.config and found.naming and not found.errors:
        problems += tensor_problems(found.dit_folder, found.config, found.naming, tensors)
    problems += map(str, component_errors(found.components, found.config))
    scanned = _scan(found, problems, on_progress) if scan else None
    missing = [name for name in COMPONENTS if name not in found.components]
    return ValidationReport(
        folder=str(found.folder),
        layout=found.layout,
        naming=found.naming,
        ok=not problems,
        problems=problems,
        warnings=found.warnings,
        tensors_present=len(tensors),
        tensors_expected=_expected_count(found),
        parameters=sum(i.count for i in tensors.values() if not i.name.endswith(SCALE)),
        bytes=sum(info.bytes for info in tensors.values()),
        dtypes=_dtypes(tensors.values()),
        shards={path.name: path.stat().st_size for path in found.weights.files if path.is_file()},
        components_present=list(found.components),
        components_missing=missing if found.layout != "dit" else [],
        nonfinite=_nonfinite(scanned) if scanned else None,
        tensors_sha256=scanned[DIT].tensors_sha256 if scanned else None,
    )


def _scan(
    found: Survey, problems: list[str], on_progress: Progress | None
) -> dict[str, ScanReport] | None:
    """A report for the DiT and each component that has weights; None where one is unreadable."""
    sets = {DIT: found.weights.tensors}
    for name, folder in found.components.items():
        sets[name] = component_weights(name, folder, []).tensors  # errors were reported already
    total, before = sum(info.bytes for tensors in sets.values() for info in tensors.values()), 0
    reports = {}
    for name, tensors in sets.items():

        def report(done: int, _: int, before: int = before) -> None:
            if on_progress:
                on_progress(before + done, total)

        try:
            reports[name] = scan_tensors(tensors.values(), on_progress=report)
        except InputError as error:
            problems.append(str(error))
            return None
        before += sum(info.bytes for info in tensors.values())
        if bad := reports[name].nonfinite:
            problems.append(
                f"NaN or infinity in {len(bad)} of the {name}'s tensors: {_placed(bad, tensors)}. "
                "Download these files again."
            )
    try:
        check_scales(sets[DIT].values())
    except InputError as error:
        problems.append(str(error))
    return reports


def _placed(names: list[str], tensors: Mapping[str, TensorInfo]) -> str:
    return some([f"{name} (in {tensors[name].path.name})" for name in names])


def _nonfinite(scanned: Mapping[str, ScanReport]) -> list[str]:
    return [
        name if part == DIT else f"{part}/{name}"
        for part, report in scanned.items()
        for name in report.nonfinite
    ]


def _size_problems(found: Survey) -> list[str]:
    claimed, index = found.weights.total_size, found.weights.index
    held = sum(info.bytes for info in found.weights.tensors.values())
    if claimed is None or claimed == held:
        return []
    return [f"{index} claims a total_size of {claimed} bytes, the shards hold {held}"]


def _expected_count(found: Survey) -> int | None:
    if not found.config or not found.naming or found.config.depth > MAX_DEPTH:
        return None
    return len(stored_tensors(found.config, found.naming, found.weights.tensors))


def _dtypes(tensors: Iterable[TensorInfo]) -> dict[str, DtypeSummary]:
    counts, sizes = Counter(), Counter()
    for info in tensors:
        counts[info.dtype] += 1
        sizes[info.dtype] += info.bytes
    return {dtype: DtypeSummary(counts[dtype], sizes[dtype]) for dtype in sorted(counts)}
