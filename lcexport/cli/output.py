"""What the commands that make a video have in common: how engines are opened, what is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lcexport.configs.tasks import Job
    from lcexport.runtime import Video

OutOption = Annotated[Path, typer.Option(help="The video, a new .mp4 file.")]
ContactSheetOption = Annotated[
    Path | None, typer.Option(help="Also write a picture of some frames, a new .png file.")
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
        help="How a TensorRT engine runs: weight_budget=BYTES or auto, cuda_graph=true; may be "
        "repeated."
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
HashesOption = Annotated[
    bool, typer.Option("--check-hashes", help="Hash the large files too, before opening them.")
]


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
