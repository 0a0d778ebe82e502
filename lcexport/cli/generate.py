"""`generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, pairs, progress_bars

if TYPE_CHECKING:
    from lcexport.runtime import StepEvent


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="What to show.")],
    out: Annotated[Path, typer.Option(help="The video, a new .mp4 file.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Also write a picture of some frames, a new .png file.")
    ] = None,
    res: Annotated[str | None, typer.Option(help="Which of the bundle's resolutions.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="The engine; the first it was built with by default.")
    ] = None,
    device: DeviceOption = "cpu",
    offload: Annotated[
        str, typer.Option(help="Text encoder and VAE: keep, cpu, or release after use.")
    ] = "keep",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the preset's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for none; the preset's by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="How a TensorRT engine runs: weight_budget=BYTES or auto, cuda_graph=true; may be "
            "repeated."
        ),
    ] = None,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Hash the large files too, before opening them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a video from a prompt."""
    from lcexport.engines.bundle import read_manifest
    from lcexport.engines.files import refuse_existing
    from lcexport.runtime import load
    from lcexport.runtime.video import check_suffix
    from lcexport.show.bundle import show_video
    from lcexport.show.console import show_json

    manifest = read_manifest(bundle)
    check_suffix(out, ".mp4")
    if contact_sheet:
        check_suffix(contact_sheet, ".png")
    refuse_existing(out, *([contact_sheet] if contact_sheet else []))
    with (
        load(
            bundle,
            res or next(iter(manifest.graphs)),
            backend or manifest.default_backend,
            device,
            engine_options=pairs(engine or ()),
            check_hashes=check_hashes,
            offload=offload,  # pyright: ignore[reportArgumentType]  # checked by `load`
        ) as pipe,
        progress_bars() as bar,
    ):

        def on_step(event: "StepEvent") -> None:
            bar("denoising", event.step, event.steps)

        video = pipe.generate(
            prompt,
            negative_prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
    video.save(out)
    if contact_sheet:
        video.save_contact_sheet(contact_sheet)
    if as_json:
        show_json({"video": out, "contact_sheet": contact_sheet, "seconds": video.timings})
    else:
        show_video(video, out, contact_sheet)
