"""What is installed here, and what it can do: `version`, `doctor`."""

import sys
from typing import Annotated

import typer

from lcexport.cli.app import JsonOption, app


@app.command()
def version() -> None:
    """Show the version."""
    import lcexport

    sys.stdout.write(f"lcexport {lcexport.__version__}\n")


@app.command()
def doctor(
    backend: Annotated[
        str | None,
        typer.Option(help="Ask about this engine only, and fail where it cannot be built here."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; both by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can build and run, and what it would need for the rest."""
    from lcexport.doctor import diagnose
    from lcexport.show.console import show_json
    from lcexport.show.machine import show_diagnosis

    diagnosis = diagnose(backend, precision)
    if as_json:
        show_json(diagnosis.as_dict())
    else:
        show_diagnosis(diagnosis)
    if backend is not None and (error := diagnosis.refusal) is not None:
        raise error
