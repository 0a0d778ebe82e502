"""`qualify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcexport.cli.app import BundleArgument, JsonOption, app, progress_bars
from lcexport.configs.errors import LcexportError, VerificationError

if TYPE_CHECKING:
    from lcexport.qualify.claims import Result


@app.command()
def qualify(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the JSON and the page.")
    ],
    backend: Annotated[
        str | None, typer.Option(help="The engine; the bundle's first compiled one by default.")
    ] = None,
    res: Annotated[str | None, typer.Option(help="Which of the bundle's resolutions.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint, to build the engine from where the bundle has none."),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first block outside; needs Polygraphy.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Test every claim about an engine on the machine at hand: one JSON and one page."""
    from lcexport.qualify.run import qualify as run_qualify
    from lcexport.show.console import show_json
    from lcexport.show.qualification import show_qualification

    with progress_bars() as bar:

        def on_result(result: "Result") -> None:
            bar(f"{result.claim.id}: {result.verdict}", 0, 1)

        found = run_qualify(
            bundle,
            output,
            backend=backend,
            resolution=res,
            device=device,
            model=model,
            bisecting=bisect,
            on_result=on_result,
            on_progress=bar,
        )
    if as_json:
        show_json(found.as_dict())
    else:
        show_qualification(found, output)
    if found.refuted:
        refuted = ", ".join(result.claim.id for result in found.refuted)
        raise VerificationError(f"refuted: {refuted}", do=f"See {output}.")
    if found.faults:
        faults = ", ".join(result.claim.id for result in found.faults)
        raise LcexportError(f"these checks failed themselves: {faults}", do=f"See {output}.")
