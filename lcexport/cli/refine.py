"""`refine`."""

from pathlib import Path
from typing import Annotated

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, progress_bars
from lcexport.cli.output import (
    BackendOption,
    ContactSheetOption,
    EngineOption,
    HashesOption,
    LibraryOption,
    OffloadOption,
    OutOption,
    TilingOption,
    check_output,
    open_pipeline,
    step_bar,
    write_video,
)

VideoArgument = Annotated[
    Path,
    typer.Argument(
        help="What `generate` wrote at one of the bundle's resolutions, of a continuation with "
        "--only-new: it has that resolution's size and number of frames."
    ),
]
ImageOption = Annotated[
    Path | None, typer.Option(help="The picture that the video was generated from.")
]
CondVideoOption = Annotated[
    Path | None,
    typer.Option(
        help="The refined video that this one goes on from: its last frames are this one's first. "
        "It is thinned to about 30 frames per second, 15 with --spatial."
    ),
]


@app.command()
def refine(
    bundle: BundleArgument,
    video: VideoArgument,
    out: OutOption,
    prompt: Annotated[str, typer.Option(help="What it shows; the original gives none.")] = "",
    image: ImageOption = None,
    cond_video: CondVideoOption = None,
    spatial: Annotated[
        bool, typer.Option("--spatial", help="Larger frames, but not twice as many.")
    ] = False,
    contact_sheet: ContactSheetOption = None,
    res: Annotated[
        str | None, typer.Option(help="The resolution it was generated at; by default it is found.")
    ] = None,
    backend: BackendOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "keep",
    steps: Annotated[int, typer.Option(help="Of the whole schedule: 50 make 5 calls.")] = 50,
    threshold: Annotated[
        float, typer.Option(help="The noise's share of the start, above 0 and up to 1.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the noise and the VAE's samples.")] = 0,
    engine: EngineOption = None,
    vae_tiling: TilingOption = False,
    library_components: LibraryOption = False,
    check_hashes: HashesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Enlarge a generated video and double its frames; the refinement's LoRA must be baked in."""
    from lcexport.cli.given import read_first_stage, refinement_for
    from lcexport.engines.bundle import Bundle
    from lcexport.engines.manifest import read_manifest
    from lcexport.runtime import Video

    check_output(out, contact_sheet)
    opened = Bundle(bundle, read_manifest(bundle))
    given = read_first_stage(video, image, cond_video, spatial, opened.most_cond_frames)
    graph = refinement_for(opened, res, given)
    with (
        open_pipeline(
            bundle,
            graph.preset.name,
            [given.task],
            backend=backend,
            device=device,
            offload=offload,
            engine=engine,
            check_hashes=check_hashes,
            vae_tiling=vae_tiling,
            library_components=library_components,
        ) as pipe,
        progress_bars() as bar,
    ):
        made = pipe.refine(
            given.frames,
            prompt,
            image=given.image,
            cond_video=given.before,
            spatial=spatial,
            seed=seed,
            steps=steps,
            t_thresh=threshold,
            on_step=step_bar(bar, "refining"),
        )
    assert isinstance(made, Video), "latents were not asked for"
    write_video(made, graph.job, out, contact_sheet, as_json)
