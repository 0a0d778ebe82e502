"""Is this bundle what it was, and do its engines compute what eager torch computes?

report        rows, thresholds, levels
levels        the five levels
modules       each call of the graph against its torch module
diagnostics   six measurements of the sampler's usual mistakes
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from lcexport.configs.components import components_of
from lcexport.engines import backend_module
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import ComponentRecord, read_manifest
from lcexport.verify.levels import (
    component_level,
    hash_level,
    load_level,
    module_level,
    step_level,
    video_level,
)
from lcexport.verify.report import LEVELS, Check, Level, Report, levels_up_to

__all__ = ["LEVELS", "Check", "Level", "Report", "levels_up_to", "verify"]


def verify(
    folder: str | Path,
    level: str = "step",
    *,
    backends: tuple[str, ...] | None = None,
    resolutions: tuple[str, ...] | None = None,
    device: str = "cpu",
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Run the checks of `level` and of every level before it.

    A damaged file ends the verification: nothing that was altered is opened.

    Args:
        backends: the engines to check; None for those the bundle was built with.
        resolutions: None for all of the bundle's.
        on_check: called with each row as it is found.

    Raises:
        IntegrityError, IncompatibleError: no bundle, or one of another schema version.
        InputError: a level that needs golden data, and the bundle has none.
    """
    bundle = Bundle(Path(folder), read_manifest(Path(folder)))
    levels = levels_up_to(level)
    engines = backends or bundle.manifest.backends
    for backend in engines:
        backend_module(backend)
    sizes = resolutions or tuple(bundle.manifest.graphs)
    rows: list[Check] = []

    def note(found: Iterator[Check]) -> bool:
        for check in found:
            rows.append(check)
            if on_check:
                on_check(check)
        return not any(check.ok is False for check in rows)

    if note(hash_level(bundle)):
        note(later_levels(bundle, levels, engines, sizes, device))
    return Report(bundle=str(folder), level=levels[-1], checks=tuple(rows))


def later_levels(
    bundle: Bundle,
    levels: tuple[Level, ...],
    engines: tuple[str, ...],
    sizes: tuple[str, ...],
    device: str,
) -> Iterator[Check]:
    """Every row after the hashes, level by level, resolution by resolution."""
    if not engines and levels != ("hash",):
        compiled = ", ".join(bundle.manifest.engines)
        why = f"compiled for a GPU; there: --backend {compiled} --device cuda"
        why = f"not checked: {why if compiled else 'none was built; name --backend'}"
        yield Check("load", "", "", "engines", {}, why, None)
    for level in levels:
        for size in sizes:
            if level == "module":
                yield from module_level(bundle, size)
            elif level == "video":
                yield from video_level(bundle, size, engines, device)
            elif level != "hash":
                for backend in engines:
                    if level == "load":
                        yield load_level(bundle, size, backend, device)
                    else:
                        yield from step_level(bundle, size, backend, device)
        if level in ("load", "step"):
            for record in compiled_components(bundle, engines, sizes):
                yield from component_level(bundle, record, level, device)


def compiled_components(
    bundle: Bundle, engines: tuple[str, ...], sizes: tuple[str, ...]
) -> list[ComponentRecord]:
    """What these engines run compiled besides the DiT, at these resolutions."""
    used = {component.name for component in components_of(bundle.graph(s).job for s in sizes)}
    records = bundle.manifest.components.items()
    return [record for name, record in records if name in used and record.product in engines]
