"""Reads a clip back: what is seen, from the pixels alone, to be held against the prompt.

Frames are float32 [F, H, W, 3] in 0..1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_toy.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    coverage,
)

BORDER = 2  # pixels at the edge, mostly background
LEAST_PIXELS = 25.0  # covered in a frame, or there is nothing to see
LEAST_FIT = 0.7  # overlap with the best shape, or it is none of them
LEAST_SPEED = 0.3  # pixels a frame, or it stands still
MOST_ASLANT = 0.5  # pixels across for each along, or it moves in none of the directions
RADII = torch.arange(6.0, 16.5, 0.5)


@dataclass(frozen=True)
class Reading:
    """A clip's attributes, by the world's words; None where they cannot be told.

    fit is the overlap of the picture and the ideal shape over their union, 0..1; centres are the
    shape's in each frame, pixels [F, 2] as x and y.
    """

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    speed: str | None = None
    size: str | None = None
    background: str | None = None
    fit: float = 0.0
    centres: Tensor | None = None

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Attribute by attribute, whether it is the scene's."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def read(frames_FHW3: Tensor) -> Reading:
    """What the clip shows."""
    frames = frames_FHW3.float()
    behind = background_of(frames)
    background = nearest(behind, BACKGROUNDS)
    cover_FHW, ink = cover_of(frames, behind)
    areas = cover_FHW.sum((1, 2))
    if float(areas.min()) < LEAST_PIXELS:
        return Reading(background=background)
    centres = centroids(cover_FHW)
    shape, radius, fit = best_shape(cover_FHW, centres)
    step_x, step_y = slopes(centres)
    speed = math.hypot(step_x, step_y)
    fits, moves = fit >= LEAST_FIT, speed >= LEAST_SPEED
    return Reading(
        colour=nearest(ink, COLOURS),
        shape=shape if fits else None,
        direction=heading(step_x, step_y) if moves else None,
        speed=closest(speed, SPEEDS) if moves else None,
        size=closest(radius, SIZES) if fits else None,
        background=background,
        fit=fit,
        centres=centres,
    )


def accuracy(readings: Iterable[tuple[Scene, Reading]]) -> dict[str, float]:
    """Share of the clips that show what the scene says, per attribute."""
    rows = [reading.agrees(scene) for scene, reading in readings]
    return {name: sum(row[name] for row in rows) / len(rows) for name in ATTRIBUTES}


def background_of(frames: Tensor) -> Tensor:
    """The median colour [3] of the edge."""
    edge = torch.ones(frames.shape[1:3], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return frames[:, edge].flatten(0, 1).median(0).values


def cover_of(frames: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel [F, H, W] is not background, 0..1; and the colour [3] of that.

    The colour is that of the pixels farthest from the background; a pixel between the two is
    partly covered.
    """
    away = (frames - behind).norm(dim=-1)
    far = away >= 0.8 * away.flatten().quantile(0.99)
    ink = frames[far].median(0).values
    across = ink - behind
    cover = ((frames - behind) @ across / across.square().sum().clamp(min=1e-6)).clamp(0, 1)
    return cover * (cover > 0.25), ink


def nearest(colour: Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((torch.tensor(palette[name]) / 255 - colour).norm()))


def closest(value: float, named: Mapping[str, float]) -> str:
    return min(named, key=lambda name: abs(named[name] - value))


def centroids(cover_FHW: Tensor) -> Tensor:
    """x and y [F, 2] of the covered pixels' middle."""
    _, height, width = cover_FHW.shape
    total = cover_FHW.sum((1, 2))
    x = (cover_FHW.sum(1) * (torch.arange(width) + 0.5)).sum(1) / total
    y = (cover_FHW.sum(2) * (torch.arange(height) + 0.5)).sum(1) / total
    return torch.stack([x, y], 1)


def best_shape(cover_FHW: Tensor, centres: Tensor) -> tuple[str, float, float]:
    """The shape and radius whose overlap over union with the picture is largest, and that."""
    found = (
        (overlap(cover_FHW, centres, shape, float(radius)), shape, float(radius))
        for shape in SHAPES
        for radius in RADII
    )
    fit, shape, radius = max(found)
    return shape, radius, fit


def overlap(cover_FHW: Tensor, centres: Tensor, shape: str, radius: float) -> float:
    """Of the ideal shape with its centroid at `centres`; the mean over the frames."""
    _, height, width = cover_FHW.shape
    # A triangle's centroid is a third of its height above its base, not half.
    low = 0.93 * radius / 3 if shape == "triangle" else 0.0
    x = torch.arange(width) + 0.5 - centres[:, 0, None, None]
    y = (torch.arange(height) + 0.5)[:, None] - (centres[:, 1, None, None] - low)
    ideal = coverage(shape, x, y, radius)
    both = torch.minimum(ideal, cover_FHW).sum((1, 2))
    either = torch.maximum(ideal, cover_FHW).sum((1, 2))
    return float((both / either).mean())


def slopes(centres: Tensor) -> tuple[float, float]:
    """Pixels a frame along x and y, by least squares."""
    time = torch.arange(len(centres)) - (len(centres) - 1) / 2
    x, y = (time[:, None] * centres).sum(0) / time.square().sum()
    return float(x), float(y)


def heading(x: float, y: float) -> str | None:
    across, along = sorted((abs(x), abs(y)))
    if across > MOST_ASLANT * along:
        return None
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * x + DIRECTIONS[name][1] * y)
