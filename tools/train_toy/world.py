"""The world that the toy is trained on: one coloured shape moves across a plain background.

A scene is a point of a small grid of attributes, a clip one of the places where it can happen, a
caption one of the ways to say it. Everything follows from the generator that is passed in.

B clips, F frames of H x W pixels, in -1..1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

HEIGHT = WIDTH = 64  # pixels
FRAMES = 17
FPS = 8

COLOURS = {
    "red": (220, 45, 45),
    "green": (45, 190, 75),
    "blue": (55, 95, 235),
    "yellow": (240, 210, 55),
    "purple": (175, 65, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels a frame
SIZES = {"small": 9.0, "large": 13.0}  # pixels from the centre to the farthest edge
# Pixels between the places where a shape can start. It moves by 4 or 8 pixels from one latent frame
# to the next, so a latent of 8 x 8 pixels sees it in few places, and more of the training goes into
# what the captions say.
GRID = 4
BACKGROUNDS = {"black": (18, 18, 22), "gray": (115, 115, 120), "brown": (95, 60, 40)}

# A scene's attributes in order, and the words for each.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}

# In the training data no shape of these colours moves that way: the prompts of the evaluation are
# about them. Each colour, shape and direction is in some other combination that is seen.
HELD = frozenset(
    (colour, SHAPES[(i + j) % 3], direction)
    for i, colour in enumerate(COLOURS)
    for j, direction in enumerate(DIRECTIONS)
    if (i + j) % 2 == 0
)


@dataclass(frozen=True)
class Scene:
    """What happens, without where."""

    colour: str
    shape: str
    direction: str
    speed: str
    size: str
    background: str

    @property
    def held(self) -> bool:
        return (self.colour, self.shape, self.direction) in HELD

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels a frame, along x and y."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]

    @property
    def travel(self) -> tuple[float, float]:
        """Pixels from the first frame of a clip to the last, along x and y."""
        x, y = self.velocity
        return x * (FRAMES - 1), y * (FRAMES - 1)


Frame = TypeVar("Frame", float, torch.Tensor)  # the number of one, or of several


@dataclass(frozen=True)
class Clip:
    """A scene, and where the shape's centre is in the first frame: x to the right, y down."""

    scene: Scene
    x: float
    y: float

    def centre(self, frame: Frame) -> tuple[Frame, Frame]:
        """x and y of the shape's centre in a frame."""
        x, y = self.scene.velocity
        return self.x + x * frame, self.y + y * frame


@cache  # it is asked for every caption
def scenes(*, held: bool) -> tuple[Scene, ...]:
    """Every scene that training sees, or every one that it does not."""
    grid = itertools.starmap(Scene, itertools.product(*ATTRIBUTES.values()))
    return tuple(scene for scene in grid if scene.held == held)


def choose(options: Sequence[object], generator: torch.Generator) -> int:
    """A place in `options`."""
    return int(torch.randint(len(options), (), generator=generator))


def placed(scene: Scene, generator: torch.Generator) -> Clip:
    """A clip in which the shape stays in the picture, but for 1.5 pixels of a triangle's ends."""
    radius = SIZES[scene.size]
    x, y = (
        free_start(length, radius, travel, float(torch.rand((), generator=generator)))
        for length, travel in zip((WIDTH, HEIGHT), scene.travel, strict=True)
    )
    return Clip(scene, x, y)


def free_start(length: int, radius: float, travel: float, share: float) -> int:
    """Where to start along one axis: `share`, 0 to below 1, of the way through the places."""
    first = math.ceil((radius + max(0.0, -travel)) / GRID)
    last = math.floor((length - radius - max(0.0, travel)) / GRID)
    return GRID * (first + int(share * (last - first + 1)))


def caption(scene: Scene, generator: torch.Generator) -> str:
    """The colour, the shape and the direction, and each of the rest as often as not."""
    size, speed, background = (torch.rand(3, generator=generator) < 0.5).tolist()
    return " ".join(
        [
            "a",
            *([scene.size] if size else []),
            scene.colour,
            scene.shape,
            "moves",
            scene.direction,
            *([scene.speed] if speed else []),
            *(["on a", scene.background, "background"] if background else []),
        ]
    )


def full_caption(scene: Scene) -> str:
    """All there is to say."""
    return (
        f"a {scene.size} {scene.colour} {scene.shape} moves {scene.direction} {scene.speed} "
        f"on a {scene.background} background"
    )


def render(clips: Sequence[Clip], frames: int = FRAMES) -> torch.Tensor:
    """[B, 3, F, H, W]; edges are one pixel wide."""
    return torch.stack([render_one(clip, frames) for clip in clips])


def render_one(clip: Clip, frames: int) -> torch.Tensor:
    scene = clip.scene
    x_F11, y_F11 = clip.centre(torch.arange(frames)[:, None, None])
    x_FHW = torch.arange(WIDTH) + 0.5 - x_F11
    y_FHW = (torch.arange(HEIGHT) + 0.5)[:, None] - y_F11
    cover_FHW = coverage(scene.shape, x_FHW, y_FHW, SIZES[scene.size])
    inside, outside = (
        torch.tensor(palette) / 127.5 - 1
        for palette in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    return torch.lerp(outside[:, None, None, None], inside[:, None, None, None], cover_FHW)


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """How much of each pixel the shape covers, 0..1; x and y count from its centre."""
    if shape == "circle":
        outside = torch.hypot(x, y) - radius
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - 0.86 * radius
    else:  # equilateral, a point up; its centre is that of its bounding box
        half_height = radius * 0.93
        slope = math.sqrt(3)
        sides = (slope * x.abs() - (y + half_height)) / 2
        outside = torch.maximum(sides, y - half_height)
    return (0.5 - outside).clamp(0, 1)
