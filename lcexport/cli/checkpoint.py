"""Commands on checkpoints: `validate`, `convert`, `demo-checkpoint`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lcexport.cli.app import IslandsOption, JsonOption, app, progress_bars
from lcexport.configs.errors import InputError


@app.command()
def validate(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's folder.")],
    scan: Annotated[bool, typer.Option(help="Also read every weight, for NaN.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say everything that is wrong with a checkpoint, of any layout."""
    from lcexport.checkpoint import validate as run_validate
    from lcexport.show.checkpoint import show_validation
    from lcexport.show.console import show_json

    with progress_bars() as bar:
        report = run_validate(
            checkpoint, scan=scan, on_progress=lambda done, total: bar("scanning", done, total)
        )
    if as_json:
        show_json(report.as_dict())
    else:
        show_validation(report)
    if not report.ok:
        raise InputError(f"{checkpoint} is not sound", got=f"{len(report.problems)} problems")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint's folder, of any layout.")],
    destination: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="`native` (FastVideo's names and folders), `original`, or `int8` (original names, "
            "quantised weights)."
        ),
    ] = "native",
    dtype: Annotated[
        str, typer.Option(help="`keep`, `bf16` for the bulk, or `fp32` for everything.")
    ] = "keep",
    islands: IslandsOption = "checkpoint",
    check: Annotated[bool, typer.Option("--check", help="Read both again and compare.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint between the released and FastVideo's names and folders, or to int8."""
    from lcexport.checkpoint import convert as run_convert
    from lcexport.show.checkpoint import show_conversion
    from lcexport.show.console import show_json

    # `convert` checks these itself and says what it knows.
    choices: dict[str, Any] = {"to": to, "dtype": dtype, "islands": islands}
    with progress_bars() as bar:
        report = run_convert(
            source,
            destination,
            check=check,
            on_progress=lambda done, total: bar("converting", done, total),
            **choices,
        )
    if as_json:
        show_json(report.as_dict())
    else:
        show_conversion(report)


@app.command("demo-checkpoint")
def demo_checkpoint(
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
    size: Annotated[
        str,
        typer.Option(
            help="`toy`, which is trained; or with random weights `demo`, or its big sibling "
            "`bench`, to measure with."
        ),
    ] = "toy",
) -> None:
    """Write a small, complete checkpoint in the released layout."""
    from lcexport.demo import make_demo_checkpoint
    from lcexport.show.console import show_text

    make_demo_checkpoint(folder, size)
    show_text(f"A {size} checkpoint is in {folder}. Next:")
    show_text(f"  lcexport build --model {folder} --res {size}")
