"""The figures as a picture: each step of each contestant, and its stages side by side."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.files import refuse_existing, write_bytes
from lcexport.runtime.video import check_suffix

STAGES = ("text", "cache", "step", "decode")  # medians; load and cold start are single readings
SINGLE = {"load": "load_seconds", "cold start": "cold_start_seconds"}
SIZE = (11, 4.5)  # inches


def matplotlib() -> ModuleType:
    """The library; IncompatibleError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise IncompatibleError(
            "--plot needs matplotlib", got=error, do="pip install 'lcexport[plot]'"
        ) from error
    return matplotlib


def check_plot(path: Path) -> None:
    """Refuse at once what `save_plot` would refuse after the measurements.

    Raises:
        UsageError: no .png.
        ResourceError: the file exists, or its folder does not.
        IncompatibleError: matplotlib is not installed.
    """
    check_suffix(path, ".png")
    refuse_existing(path)
    matplotlib()


def save_plot(document: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a finished run, a new .png file."""
    figure = matplotlib().figure.Figure(figsize=SIZE, layout="constrained")
    steps, stages = figure.subplots(1, 2)
    contestants = document["contestants"]
    for one in contestants:
        seconds = one["step_seconds"]
        steps.plot(range(1, len(seconds) + 1), seconds, marker="o", label=one["name"])
    steps.set(title="guided step", xlabel="step, in the order taken", ylabel="seconds")
    steps.set_ylim(bottom=0)
    steps.legend()
    names = [n for n in (*STAGES, *SINGLE) if any(stage(one, n) for one in contestants)]
    width = 0.8 / len(contestants)
    for index, one in enumerate(contestants):
        places = [place + index * width for place in range(len(names))]
        stages.bar(places, [stage(one, name) for name in names], width, label=one["name"])
    middle = 0.4 - width / 2
    stages.set_xticks([place + middle for place in range(len(names))], names)
    stages.set(title="stages", ylabel="seconds")
    stages.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def stage(contestant: Mapping[str, Any], name: str) -> float:
    """Seconds of a stage; 0 where there is none."""
    if name in SINGLE:
        return contestant[SINGLE[name]]
    return contestant.get(name, {}).get("median_seconds", 0.0)
