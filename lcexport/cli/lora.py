"""`lora inspect`, `lora bake` and `lora remove`."""

from pathlib import Path
from typing import Annotated

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, progress_bars

lora_app = typer.Typer(help="LoRAs: look at one, put some into a bundle, take them out.")
app.add_typer(lora_app, name="lora")

GoldenOption = Annotated[
    bool,
    typer.Option(
        "--golden/--no-golden",
        help="Compute the outputs `verify` compares with; needs the whole model in memory.",
    ),
]


@lora_app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA in the original's format.")],
    bundle: Annotated[Path | None, typer.Option(help="Does it fit this bundle's model?")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which modules a LoRA changes, and refuse one that is damaged or does not fit."""
    from lcexport.configs.dit import DiTConfig
    from lcexport.engines.bundle import open_bundle
    from lcexport.engines.manifest import DIT_CONFIG
    from lcexport.lora import check_fits, check_values, read_lora
    from lcexport.show.console import show_json
    from lcexport.show.lora import lora_document, show_lora

    lora = read_lora(file)
    if bundle:
        check_fits(lora, DiTConfig.from_json(open_bundle(bundle).path(DIT_CONFIG)))
    check_values(lora)
    if as_json:
        show_json(lora_document(lora, True if bundle else None))
    else:
        show_lora(lora, f"the model of {bundle}" if bundle else None)


@lora_app.command()
def bake(
    bundle: BundleArgument,
    loras: Annotated[
        list[str],
        typer.Argument(
            metavar="LORA[:STRENGTH]...", help="Files; the weights get these and no others."
        ),
    ],
    golden: GoldenOption = True,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Merge LoRAs into a bundle's weights. They replace those that were baked in before."""
    from lcexport.lora import bake as run_bake
    from lcexport.lora import choice_from
    from lcexport.show.console import show_json
    from lcexport.show.lora import show_loras

    choices = [choice_from(word) for word in loras]
    with progress_bars() as bar:
        changed = run_bake(
            bundle,
            choices,
            golden=golden,
            device=device,
            on_progress=lambda done, total: bar("weights", done, total),
        )
    if as_json:
        show_json(changed.manifest.model_dump(mode="json"))
    else:
        show_loras(changed)


@lora_app.command()
def remove(
    bundle: BundleArgument,
    golden: GoldenOption = True,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Give a bundle the weights back that it was built with, byte for byte."""
    from lcexport.lora import remove as run_remove
    from lcexport.show.console import show_json
    from lcexport.show.lora import show_loras

    changed = run_remove(bundle, golden=golden, device=device)
    if as_json:
        show_json(changed.manifest.model_dump(mode="json"))
    else:
        show_loras(changed)
