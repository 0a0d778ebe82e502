"""`generate`."""

from pathlib import Path
from typing import Annotated

import typer

from lcexport.cli.app import DeviceOption, JsonOption, app, progress_bars
from lcexport.cli.output import (
    BackendOption,
    ContactSheetOption,
    EngineOption,
    HashesOption,
    KeepEnginesOption,
    LibraryOption,
    OffloadOption,
    OutOption,
    ResolutionOption,
    TilingOption,
    check_output,
    open_pipeline,
    step_bar,
    write_video,
)
from lcexport.configs.errors import UsageError

ImageOption = Annotated[
    Path | None,
    typer.Option(
        help="Start from this picture, stretched to the resolution; the video keeps that size."
    ),
]
VideoOption = Annotated[
    Path | None,
    typer.Option(
        help="Go on from the end of this video, thinned to about 15 frames per second. Its frames "
        "are written first and the new ones after them, all of this video's size."
    ),
]
CondFramesOption = Annotated[
    int | None,
    typer.Option(
        help="Frames a continuation starts from: an error unless the bundle was built so."
    ),
]
CacheOption = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Of a continuation: compute its given frames' keys and values once, or go through "
        "them at each step (task vc-uncached).",
    ),
]
EnhanceOption = Annotated[
    bool | None,
    typer.Option(
        "--enhance-hf/--no-enhance-hf",
        help="End in ten uniform steps, for detail; a continuation does unless distilled.",
    ),
]


DemoOption = Annotated[
    str | None,
    typer.Option(
        "--demo",
        metavar="PROMPT",
        help="With no bundle: show this by the small trained checkpoint that comes along, such as "
        '"a red circle moves left". Its bundle is made once, in the cache folder.',
    ),
]


@app.command()
def generate(
    out: OutOption,
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's folder.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    demo: DemoOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    contact_sheet: ContactSheetOption = None,
    only_new: Annotated[
        bool, typer.Option("--only-new", help="Write a continuation alone, at its resolution.")
    ] = False,
    res: ResolutionOption = None,
    cond_frames: CondFramesOption = None,
    cache: CacheOption = True,
    offload_cache: Annotated[
        bool, typer.Option("--offload-cache", help="Keep a continuation's cache on the host.")
    ] = False,
    backend: BackendOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "keep",
    keep_engines: KeepEnginesOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; the preset's, or 16 distilled.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for none; the preset's by default, or 1 distilled.")
    ] = None,
    distill: Annotated[
        bool,
        typer.Option("--distill", help="The distilled model's steps; its LoRA must be baked in."),
    ] = False,
    enhance_hf: EnhanceOption = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    engine: EngineOption = None,
    vae_tiling: TilingOption = False,
    library_components: LibraryOption = False,
    check_hashes: HashesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a video from a prompt alone, from an image, or going on from a video."""
    from lcexport.cli.given import (
        check_cond_frames,
        check_continuation,
        check_joined,
        graph_for,
        joined,
        read_source,
    )
    from lcexport.engines.bundle import Bundle
    from lcexport.engines.manifest import read_manifest

    check_output(out, contact_sheet)
    bundle, prompt, res = asked(bundle, prompt, demo, res)
    check_continuation(
        video, only_new=only_new, cond_frames=cond_frames is not None, no_cache=not cache,
        offload_cache=offload_cache,
    )  # fmt: skip
    opened = Bundle(bundle, read_manifest(bundle))
    source = read_source(image, video, cache, opened.most_cond_frames if only_new else None)
    graph = graph_for(opened, res, source)
    check_cond_frames(opened, graph.job, cond_frames)
    source.check(graph.job)
    if not only_new:
        check_joined(source)
    with (
        open_pipeline(
            bundle,
            graph.preset.name,
            [source.task],
            backend=backend,
            device=device,
            offload=offload,
            engine=engine,
            keep_engines=keep_engines,
            check_hashes=check_hashes,
            vae_tiling=vae_tiling,
            library_components=library_components,
        ) as pipe,
        progress_bars() as bar,
    ):
        made = pipe.generate(
            prompt,
            negative_prompt,
            task=source.task,
            image=source.image,
            video=source.video,
            offload_cache=offload_cache,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            distill=distill,
            enhance_hf=enhance_hf,
            on_step=step_bar(bar, "denoising"),
        )
    if source.video is not None and not only_new:
        made = joined(source.video, made, graph.job.cond_frames)
    write_video(made, graph.job, out, contact_sheet, as_json)


def asked(
    bundle: Path | None, prompt: str | None, demo: str | None, res: str | None
) -> tuple[Path, str, str | None]:
    """The bundle, what it is to show and at which resolution: the ones given, or the demo's.

    Raises:
        UsageError: both ways at once, or neither whole.
    """
    if demo is not None and bundle is None and prompt is None:
        from lcexport.demo import TOY_PRESET, toy_bundle

        return toy_bundle(), demo, res or TOY_PRESET
    if demo is not None or bundle is None or prompt is None:
        raise UsageError(
            "what is to be shown, and by what, is not said once",
            do='Name a bundle and give --prompt; or give --demo "a red circle moves left" alone.',
        )
    return bundle, prompt, res
