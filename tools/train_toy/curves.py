"""Each part's loss as a picture: `python -m tools.train_toy.curves FOLDER PNG`."""

import sys
from pathlib import Path

from tools.train_toy.training import read_log

PARTS = ("text", "vae-pictures", "vae-clips", "vae-whole", "dit", "lora")
POINTS = 10  # of a curve, or up to twice as many; fewer only where its log has fewer lines


def main(folder: Path, picture: Path) -> None:
    """Draw what `folder` has logs of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(PARTS), 2.6), layout="constrained")
    for place, part in enumerate(PARTS, 1):
        lines = read_log(folder / f"{part}.jsonl")
        axes = figure.add_subplot(1, len(PARTS), place)
        for name in lines[0].keys() - {"step", "seconds"}:
            steps, values = smoothed([(line["step"], line[name]) for line in lines])
            axes.semilogy(steps, values, label=name)
        axes.set_title(part, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.savefig(picture, dpi=110)


def smoothed(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of as many points each as leave `POINTS`."""
    window = max(1, len(points) // POINTS)
    groups = [points[i : i + window] for i in range(0, len(points), window)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [mean[0] for mean in means], [mean[1] for mean in means]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
