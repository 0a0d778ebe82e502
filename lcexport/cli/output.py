"""What the commands that make a video have in common: how engines are opened, what is written."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcexport.cli.app import pairs

if TYPE_CHECKING:
    from lcexport.configs.tasks import Job
    from lcexport.runtime import Pipeline, StepEvent, Video

OutOption = Annotated[Path, typer.Option(help="The video, a new .mp4 file.")]
ContactSheetOption = Annotated[
    Path | None, typer.Option(help="Also write a picture of some frames, a new .png file.")
]
ResolutionOption = Annotated[
    str | None,
    typer.Option(
        help="Which of the bundle's resolutions: by default the model's nearest to the shape of "
        "the picture or video, or the first. A picture or video is stretched to it."
    ),
]
BackendOption = Annotated[
    str | None, typer.Option(help="The engine; the first it was built with by default.")
]
OffloadOption = Annotated[
    str, typer.Option(help="Text encoder and VAE: keep, cpu, or release after use.")
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        help="How an engine runs: cuda_graph=true (TensorRT; ONNX Runtime on CUDA), "
        "weight_budget=BYTES or auto (TensorRT); may be repeated."
    ),
]
KeepEnginesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many engines, one for each graph, stay open: 1 for the least memory, and the "
        "time to open them again. All by default.",
    ),
]
TilingOption = Annotated[
    bool,
    typer.Option(
        "--vae-tiling", help="The VAE in tiles: less memory, more work, slightly other frames."
    ),
]
LibraryOption = Annotated[
    bool,
    typer.Option(
        "--library-components",
        help="Text encoder and VAE by the library, although the bundle has compiled ones.",
    ),
]
HashesOption = Annotated[
    bool, typer.Option("--check-hashes", help="Hash the large files too, before opening them.")
]


def open_pipeline(
    bundle: Path,
    resolution: str,
    tasks: Sequence[str],
    *,
    backend: str | None,
    device: str,
    offload: str,
    engine: Iterable[str] | None,
    check_hashes: bool,
    vae_tiling: bool,
    library_components: bool,
    keep_engines: int | None = None,
) -> "Pipeline":
    """The bundle at a resolution, with the tasks' engines opened; arguments are the options'."""
    from lcexport.engines.host import keep_freed_memory
    from lcexport.engines.manifest import read_manifest
    from lcexport.runtime import load

    keep_freed_memory()
    return load(
        bundle,
        resolution,
        backend or read_manifest(bundle).default_backend,
        device,
        tasks=tasks,
        engine_options=pairs(engine or ()),
        check_hashes=check_hashes,
        keep_engines=keep_engines,
        vae_tiling=vae_tiling,
        compiled_components=not library_components,
        offload=offload,  # pyright: ignore[reportArgumentType]  # checked by `load`
    )


def step_bar(bar: Callable[[str, int, int], None], what: str) -> "Callable[[StepEvent], None]":
    """A callback that draws the steps of one sampling."""
    return lambda event: bar(what, event.step, event.steps)


def check_output(out: Path, contact_sheet: Path | None) -> None:
    """Refuse what cannot be written before anything is computed."""
    from lcexport.engines.files import refuse_existing
    from lcexport.runtime.video import check_suffix

    check_suffix(out, ".mp4")
    if contact_sheet:
        check_suffix(contact_sheet, ".png")
    refuse_existing(out, *([contact_sheet] if contact_sheet else []))


def write_video(
    video: "Video", job: "Job", out: Path, contact_sheet: Path | None, as_json: bool
) -> None:
    """Write a video and say where it is, what made it and what it took."""
    from lcexport.show.bundle import show_video
    from lcexport.show.console import show_json

    video.save(out)
    if contact_sheet:
        video.save_contact_sheet(contact_sheet)
    if as_json:
        show_json(
            {
                "video": out,
                "contact_sheet": contact_sheet,
                "task": job.task,
                "resolution": job.preset.name,
                "seconds": video.timings,
            }
        )
    else:
        show_video(video, out, contact_sheet)
