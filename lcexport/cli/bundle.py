"""Commands on a finished bundle: `inspect`, `verify`, `check`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, names, progress_bars
from lcexport.configs.errors import BuildError, IntegrityError, VerificationError


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle holds and how it was made. Needs no GPU and reads no weight."""
    from lcexport.engines.bundle import Bundle
    from lcexport.engines.manifest import read_manifest
    from lcexport.show.bundle import show_bundle
    from lcexport.show.console import show_json

    manifest = read_manifest(bundle)
    if as_json:
        show_json(manifest.model_dump(mode="json"))
    else:
        show_bundle(Bundle(bundle, manifest))


@app.command()
def verify(
    bundle: BundleArgument,
    level: Annotated[
        str, typer.Option(help="hash, load, module, step or video; each includes the former.")
    ] = "step",
    backend: Annotated[
        str | None, typer.Option(help="Engines to check; those it was built with by default.")
    ] = None,
    res: Annotated[str | None, typer.Option(help="Resolutions; all by default.")] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Compare a bundle's files with its manifest, and its engines with eager torch."""
    from lcexport.show.bundle import show_verification
    from lcexport.show.console import show_json
    from lcexport.verify import levels_up_to
    from lcexport.verify import verify as run_verify

    levels = levels_up_to(level)

    with progress_bars() as bar:
        report = run_verify(
            bundle,
            level,
            backends=names(backend),
            resolutions=names(res),
            device=device,
            on_check=lambda row: bar("verifying", levels.index(row.level), len(levels)),
        )
    if as_json:
        show_json(report.as_dict())
    else:
        show_verification(report)
    if any(check.level == "hash" for check in report.failed):
        raise IntegrityError(f"{bundle} is damaged", do="Copy it again, or rebuild it.")
    if not report.ok:
        raise VerificationError(f"{bundle} left its thresholds in {len(report.failed)} checks")


@app.command()
def check(
    bundle: BundleArgument,
    target: Annotated[
        str, typer.Option(help="tensorrt-10, tensorrt-11 or tensorrt-rtx.")
    ] = "tensorrt-11",
    as_json: JsonOption = False,
) -> None:
    """Say where a bundle's graphs break lcexport's rules for TensorRT. Needs no TensorRT."""
    from lcexport.engines.bundle import open_bundle
    from lcexport.graph.check import check_graph
    from lcexport.show.bundle import show_violations
    from lcexport.show.console import show_json

    opened = open_bundle(bundle)
    # `check_graph` refuses an unknown target itself, and says which there are.
    chosen: Any = target
    found = {
        name: check_graph(opened.path(graph.file), chosen)
        for name, graph in opened.manifest.graphs.items()
    }
    if as_json:
        graphs = {name: [asdict(violation) for violation in row] for name, row in found.items()}
        show_json({"target": target, "graphs": graphs})
    else:
        show_violations(found, target)
    if count := sum(map(len, found.values())):
        raise BuildError(
            f"the graphs of {bundle} break lcexport's rules for {target}", got=f"{count} violations"
        )
