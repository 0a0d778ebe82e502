"""What can be asked of the model, and what each graph is for: a task at a size.

    t2v          text to video: all latents are noise
    i2v          image to video: the first latent frame is the image, clean
    vc           continuation of a video, whose clean frames are cached once as keys and values
    vc-uncached  the same, with the clean frames in front of the noise at every step
    refine       a finished video at a higher resolution and twice its frames
    spatial      a finished video at a higher resolution
    refine-i2v, spatial-i2v, refine-vc, spatial-vc   the same, after a clean image or clean frames

A task is a graph, except `vc`, which is two: one makes the cache, the other uses it.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from lcexport.configs.buckets import bucket
from lcexport.configs.errors import UsageError
from lcexport.configs.presets import (
    LATENT_CHANNELS,
    PATCH,
    PIXEL_MULTIPLE,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    Preset,
)
from lcexport.configs.refinement import REFINE_SCALE, RefineShape

Task = Literal[
    "t2v",
    "i2v",
    "vc",
    "vc-uncached",
    "refine",
    "refine-i2v",
    "refine-vc",
    "spatial",
    "spatial-i2v",
    "spatial-vc",
]
TASKS: tuple[Task, ...] = get_args(Task)
CONTINUATIONS: tuple[Task, ...] = ("vc", "vc-uncached")
Part = Literal["denoise", "cache"]
After = Literal["", "i2v", "vc"]  # what a refinement goes on from
COND_FRAMES = 13  # frames a continuation starts from, as the original's demos have it
GRAPH_OPTIONS: dict[str, object] = {  # of a build, that change its graphs; with their defaults
    "cond_frames": COND_FRAMES,
    "refine_size": None,
    "refine_cond_frames": None,
    "dense": False,
    "precision": "fp32",
    "islands": "checkpoint",
    "weights_dtype": "bulk",
    "batch": 1,
}


class Job(BaseModel):
    """What one graph computes.

    Attributes:
        preset: the size that a first generation has; a refinement starts from its videos.
        height, width: of this task's videos, in pixels.
        latent_frames: T of the graph's latents.
        num_cond_latents: clean frames in front, among those.
        cached_latents: clean frames before those, given as keys and values.
        cond_frames: frames of video that the clean latents are made of.
        sparse: whether self-attention is block-sparse.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset
    task: Task = "t2v"
    part: Part = "denoise"
    height: int
    width: int
    latent_frames: int = Field(ge=1)
    num_cond_latents: int = Field(default=0, ge=0)
    cached_latents: int = Field(default=0, ge=0)
    cond_frames: int = Field(default=0, ge=0)
    sparse: bool = False

    @property
    def name(self) -> str:
        return job_name(self.preset.name, self.task, self.part)

    @property
    def text_tokens(self) -> int:
        return self.preset.text_tokens

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(16, T, H, W) of one sample's latents."""
        height, width = self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE
        return (LATENT_CHANNELS, self.latent_frames, height, width)

    @property
    def frame_tokens(self) -> int:
        _, _, height, width = self.latent_shape
        return (height // PATCH) * (width // PATCH)

    @property
    def tokens(self) -> int:
        """N, the length of the DiT's sequence, without what is cached."""
        return self.latent_frames * self.frame_tokens

    @property
    def frames(self) -> int:
        """Frames of the finished video; of a cache, those it is made of."""
        shape = self.refinement
        if shape is not None:
            return shape.new_frames
        return self.cond_frames if self.part == "cache" else self.preset.frames

    @property
    def attentions(self) -> int:
        """Attention layers of a block: self-attention is two where it is split."""
        return (2 if self.num_cond_latents else 1) + (1 if self.part == "denoise" else 0)

    @property
    def sparse_attentions(self) -> int:
        """How many of these are block-sparse."""
        return (2 if self.num_cond_latents else 1) if self.sparse else 0

    @property
    def refinement(self) -> RefineShape | None:
        """The frames of a refinement; None for other tasks."""
        if not refines(self.task):
            return None
        return RefineShape(self.preset.frames, self.cond_frames, self.task.startswith("spatial"))

    @property
    def options(self) -> dict[str, object]:
        """The options of a build that made this graph's shape, for `build_words`."""
        if not refines(self.task):
            return {"cond_frames": self.cond_frames}
        size = (self.height, self.width)
        return {"refine_size": size, "refine_cond_frames": self.cond_frames}


def build_words(resolution: str, task: str, options: Mapping[str, object]) -> list[str]:
    """What `lcexport build` is told to make a task's graphs; defaults are left out.

    Args:
        options: fields of a build's options, as a manifest records them; only those in
            `GRAPH_OPTIONS` that this task depends on are looked at.
    """
    words = ["--res", resolution, *(["--task", task] if task != "t2v" else [])]
    for name, default in GRAPH_OPTIONS.items():
        value = options.get(name, default)
        if value == default or not depends_on(task, name):
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list | tuple):  # a size
            words.append("x".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return words


def depends_on(task: str, option: str) -> bool:
    """Whether an option of a build says anything of this task's graphs."""
    kind, _, after = task.partition("-")
    if option == "cond_frames":
        return "vc" in (kind, after)
    if option == "refine_cond_frames":
        return after == "vc"
    return option != "refine_size" or refines(task)


def refines(task: str) -> bool:
    """Whether a task starts from a finished video."""
    return task.partition("-")[0] in ("refine", "spatial")


def job_name(resolution: str, task: str, part: str = "denoise") -> str:
    """A graph's name in its bundle: `480p`, `480p.i2v`, `480p.vc.cache`."""
    names = [resolution, *([task] if task != "t2v" else []), *([part] if part == "cache" else [])]
    return ".".join(names)


def task_in(name: str) -> tuple[str, str, str]:
    """The resolution, task and part that `job_name` made a name of."""
    resolution, *rest = name.split(".")
    part = "cache" if rest[-1:] == ["cache"] else "denoise"
    return resolution, rest[0] if rest and rest[0] in TASKS else "t2v", part


def refine_task(spatial: bool, after: After = "") -> Task:
    """The task that refines a video: larger alone, or longer too; after a picture or frames."""
    kind = "spatial" if spatial else "refine"
    return task_from(f"{kind}-{after}" if after else kind)


def task_from(text: str) -> Task:
    """The task of that name. UsageError where there is none."""
    for task in TASKS:
        if task == text:
            return task
    raise UsageError("unknown task", got=repr(text), wanted=f"one of {', '.join(TASKS)}")


def jobs_for(
    preset: Preset,
    task: Task,
    *,
    cond_frames: int = COND_FRAMES,
    refine_size: tuple[int, int] | None = None,
    refine_cond_frames: int | None = None,
    sparse: bool = False,
    all_sparse: bool = False,
) -> tuple[Job, ...]:
    """The graphs that a task needs at a size, in the order they are used.

    Args:
        cond_frames: frames a continuation starts from.
        refine_size: (height, width) of refined videos; the 720p bucket of the preset's shape
            where None.
        refine_cond_frames: refined frames that a refinement starts from; where None as many as
            show what the continuation started from.
        sparse: make the refinement's self-attention block-sparse.
        all_sparse: and that of the other tasks, but for the cached one.

    Raises:
        UsageError: a size or a number of frames that the task cannot take.
    """
    kind, _, after = task.partition("-")
    if kind in ("refine", "spatial"):
        doubled = cond_frames * (2 if kind == "refine" else 1)
        count = {"": 0, "i2v": 1, "vc": refine_cond_frames or doubled}[after]
        return (refine_job(preset, task, count, refine_size, sparse),)
    size: dict[str, Any] = {
        "preset": preset,
        "task": task,
        "height": preset.height,
        "width": preset.width,
    }
    frames = preset.latent_frames
    if task != "vc":
        size["sparse"] = all_sparse
    elif all_sparse:
        raise UsageError(
            "a continuation with a cache has no block-sparse attention",
            do="Build vc-uncached, or use --dense.",
        )
    if task == "t2v":
        return (Job(**size, latent_frames=frames),)
    count = 1 if task == "i2v" else cond_frames
    clean = clean_latents(preset, count)
    if task != "vc":
        return (Job(**size, latent_frames=frames, num_cond_latents=clean, cond_frames=count),)
    return (
        Job(**size, part="cache", latent_frames=clean, cond_frames=count),
        Job(**size, latent_frames=frames - clean, cached_latents=clean, cond_frames=count),
    )


def clean_latents(preset: Preset, cond_frames: int) -> int:
    """Latent frames of this many frames of video; UsageError where nothing is left to generate."""
    if (cond_frames - 1) % TEMPORAL_STRIDE:
        raise UsageError(
            "the VAE takes frames in fours after the first, and would leave out the last ones",
            got=f"{cond_frames} frames",
            wanted="4k+1, such as 13",
        )
    clean = 1 + (cond_frames - 1) // TEMPORAL_STRIDE
    if not cond_frames >= 1 or clean >= preset.latent_frames:
        raise UsageError(
            f"conditioning frames leave nothing to generate at {preset.name}",
            got=f"{cond_frames} of {preset.frames} frames",
            wanted=f"1..{(preset.latent_frames - 1) * TEMPORAL_STRIDE}",
        )
    return clean


def refine_job(
    preset: Preset, task: Task, cond_frames: int, size: tuple[int, int] | None, sparse: bool
) -> Job:
    """The graph of a refinement, whose latents are padded to whole groups of four frames."""
    height, width = size or bucket("720p", preset.height, preset.width, REFINE_SCALE)
    multiple = REFINE_SCALE if sparse else PIXEL_MULTIPLE
    if height % multiple or width % multiple:
        raise UsageError(
            f"refined videos have sides in multiples of {multiple} pixels",
            got=f"{height}x{width}",
            do="For example --refine-size 704x1280"
            + (", or --dense for multiples of 16." if sparse else "."),
        )
    shape = RefineShape(preset.frames, cond_frames, task.startswith("spatial"))
    return Job(
        preset=preset,
        task=task,
        height=height,
        width=width,
        latent_frames=shape.latents,
        num_cond_latents=shape.cond_latents,
        cond_frames=cond_frames,
        sparse=sparse,
    )
