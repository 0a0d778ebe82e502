"""`contact-sheet`."""

from pathlib import Path
from typing import Annotated

import typer

from lcexport.cli.app import app, pairs


@app.command()
def contact_sheet(
    out: Annotated[Path, typer.Argument(help="The picture, a new .png file.")],
    videos: Annotated[
        list[str], typer.Argument(metavar="LABEL=VIDEO...", help="One row each, in this order.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Frames of each video, evenly spaced.")] = 6,
) -> None:
    """Show some frames of several videos in one picture, a labelled row for each."""
    from lcexport.engines.files import refuse_existing
    from lcexport.runtime.media import read_video
    from lcexport.runtime.video import check_suffix, draw_sheet, evenly_spaced, save_sheet
    from lcexport.show.console import show_text

    check_suffix(out, ".png")
    refuse_existing(out)
    named = pairs(videos)
    rows = [evenly_spaced(*read_video(path), count, label) for label, path in named.items()]
    show_text(str(save_sheet(draw_sheet(rows), out)))
