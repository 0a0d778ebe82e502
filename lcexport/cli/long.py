"""`long`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, progress_bars
from lcexport.cli.output import (
    BackendOption,
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
)
from lcexport.configs.errors import InputError, UsageError

if TYPE_CHECKING:
    from lcexport.runtime import StepEvent


@app.command("long")
def long_video(
    bundle: BundleArgument,
    out: OutOption,
    work: Annotated[
        Path,
        typer.Option(help="Folder for finished segments; the same command again continues there."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What to show, in every segment.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line, for one segment each.")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help="How many; as many as prompts, or 12 of one.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The first frame, a picture.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to continue.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    seed: Annotated[int, typer.Option(help="Each segment's seed is made of it.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Of each segment; the preset's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for none; the preset's by default.")
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="The distilled model's schedule.")
    ] = False,
    enhance_hf: Annotated[
        bool | None,
        typer.Option(help="End continuing segments in ten uniform steps; yes unless distilled."),
    ] = None,
    uint8: Annotated[
        bool,
        typer.Option("--uint8/--float32", help="What segments hand on; float32 is 4 times larger."),
    ] = True,
    refine: Annotated[
        bool, typer.Option("--refine", help="Refine the result, window by window.")
    ] = False,
    spatial: Annotated[
        bool, typer.Option("--spatial", help="Refined: larger frames, but not more of them.")
    ] = False,
    refine_bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle with the refinement's weights; the same one by default."),
    ] = None,
    res: ResolutionOption = None,
    backend: BackendOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "keep",
    keep_engines: KeepEnginesOption = None,
    engine: EngineOption = None,
    vae_tiling: TilingOption = False,
    library_components: LibraryOption = False,
    check_hashes: HashesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a long video of segments that each continue the one before.

    Interrupted or killed, run the same command again: it goes on after the last finished segment.
    """
    from lcexport.cli.given import graph_for, read_source
    from lcexport.engines.bundle import Bundle
    from lcexport.engines.manifest import read_manifest
    from lcexport.runtime import generate_long, refine_long
    from lcexport.runtime.long import prompts_for
    from lcexport.show.bundle import show_long_video
    from lcexport.show.console import show_json

    check_output(out, None)
    texts = prompts_for(prompts_from(prompt, prompts), segments)
    if not refine and (spatial or refine_bundle):
        raise UsageError("nothing is refined", do="Add --refine.")
    source = read_source(image, video, cache=True)
    graph = graph_for(Bundle(bundle, read_manifest(bundle)), res, source)
    source.check(graph.job)
    res = graph.preset.name
    if refine:
        longer = source.video is not None and len(source.video) > graph.job.cond_frames
        check_refinement(refine_bundle or bundle, res, spatial, len(texts) > 1 or longer)
    opened = partial(
        open_pipeline, resolution=res, tasks=(), backend=backend, device=device, offload=offload,
        engine=engine, keep_engines=keep_engines, check_hashes=check_hashes,
        vae_tiling=vae_tiling,
        library_components=library_components,
    )  # fmt: skip
    with progress_bars() as bar:
        with opened(bundle) as pipe:
            made = generate_long(
                pipe, texts, work / "segments", negative_prompt=negative_prompt,
                image=source.image, video=source.video, seed=seed, steps=steps,
                guidance_scale=guidance_scale, distill=distill, enhance_hf=enhance_hf,
                uint8=uint8, **progress(bar, "segment"),
            )  # fmt: skip
        if refine:  # its engines are opened when the others are closed
            with opened(refine_bundle or bundle) as pipe:
                made = refine_long(
                    pipe, made, work / "refined", spatial=spatial, seed=seed,
                    **progress(bar, "window"),
                )  # fmt: skip
    made.save(out)
    if as_json:
        show_json({"video": out, "frames": made.frames, "fps": made.fps, "folder": made.folder})
    else:
        show_long_video(made, out)


def prompts_from(prompt: str | None, file: Path | None) -> list[str]:
    """The one prompt, or the file's lines; empty ones are left out."""
    if (prompt is None) == (file is None):
        raise UsageError("what to show is not said, or said twice", wanted="--prompt or --prompts")
    if file is None:
        return [prompt or ""]
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", wanted="a text file") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{file} has no prompt in it", wanted="one a line")
    return found


def check_refinement(folder: Path, res: str, spatial: bool, several: bool) -> None:
    """A graph that the refinement lacks is an error now, not after hours of work."""
    from lcexport.engines.bundle import Bundle
    from lcexport.engines.manifest import read_manifest
    from lcexport.runtime.long_refining import refine_tasks

    for task in refine_tasks(spatial, several):
        Bundle(folder, read_manifest(folder)).job_graph(res, task)


def progress(bar: Callable[[str, int, int], None], what: str) -> dict[str, Any]:
    """Callbacks that draw a bar for the segments, and one for each segment's steps."""
    number = 0

    def on_segment(done: int, total: int) -> None:
        nonlocal number
        number = done + 1
        bar(f"{what}s", done, total)

    def on_step(event: "StepEvent") -> None:
        step_bar(bar, f"{what} {number}")(event)

    return {"on_segment": on_segment, "on_step": on_step}
