"""`long`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcexport.cli.app import BundleArgument, DeviceOption, JsonOption, app, pairs, progress_bars
from lcexport.cli.output import KeepEnginesOption
from lcexport.configs.errors import InputError, UsageError

if TYPE_CHECKING:
    from lcexport.runtime import Pipeline, StepEvent


@app.command("long")
def long_video(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="The video, a new .mp4 file.")],
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
    res: Annotated[str | None, typer.Option(help="Which of the bundle's resolutions.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="The engine; the first it was built with by default.")
    ] = None,
    device: DeviceOption = "cpu",
    offload: Annotated[
        str, typer.Option(help="Text encoder and VAE: keep, cpu, or release after use.")
    ] = "keep",
    keep_engines: KeepEnginesOption = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="How a TensorRT engine runs, as for `generate`; may be repeated."),
    ] = None,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Hash the large files too, before opening them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a long video of segments that each continue the one before.

    Interrupted or killed, run the same command again: it goes on after the last finished segment.
    """
    from lcexport.engines.bundle import read_manifest
    from lcexport.engines.files import refuse_existing
    from lcexport.runtime import generate_long, load, refine_long
    from lcexport.runtime.long import prompts_for
    from lcexport.runtime.video import check_suffix
    from lcexport.show.bundle import show_long_video
    from lcexport.show.console import show_json

    check_suffix(out, ".mp4")
    refuse_existing(out)
    texts = prompts_for(prompts_from(prompt, prompts), segments)
    res = res or next(iter(read_manifest(bundle).graphs.values())).preset.name
    if refine:
        check_refinement(refine_bundle or bundle, res, spatial, len(texts) > 1 or video is not None)
    elif spatial or refine_bundle:
        raise UsageError("nothing is refined", do="Add --refine.")

    def opened(folder: Path) -> "Pipeline":
        return load(
            folder, res, backend or read_manifest(folder).default_backend, device, tasks=(),
            offload=offload,  # pyright: ignore[reportArgumentType]  # checked by `load`
            engine_options=pairs(engine or ()), keep_engines=keep_engines,
            check_hashes=check_hashes,
        )  # fmt: skip

    with progress_bars() as bar:
        with opened(bundle) as pipe:
            made = generate_long(
                pipe, texts, work / "segments", negative_prompt=negative_prompt, image=image,
                video=video, seed=seed, steps=steps, guidance_scale=guidance_scale,
                distill=distill, enhance_hf=enhance_hf, uint8=uint8, **progress(bar, "segment"),
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
    from lcexport.engines.bundle import Bundle, read_manifest
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
        bar(f"{what} {number}", event.step, event.steps)

    return {"on_segment": on_segment, "on_step": on_step}
