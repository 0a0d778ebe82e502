"""What a generation starts from, beside text: nothing, an image, a video, or latents of them.

Clean latent frames come first in every graph that has any; what they are made of decides the task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job, Task
from lcexport.runtime.cache import KeyValueCache
from lcexport.runtime.media import (
    CONTINUATION_FPS,
    Pixels,
    check_pixels,
    read_image,
    read_video,
    resize_video,
    truncated_uint8,
)
from lcexport.runtime.video import Video

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource = Union[str, Path, Pixels, "Image"]
Pictures = Sequence["Image"]
VideoSource = str | Path | Pixels | Video | Pictures
# pixels [B, 3, F, H, W], the posterior's noise, dtype -> latents; see `Components.encode_frames`
Encode = Callable[[torch.Tensor, torch.Tensor | torch.Generator, torch.dtype], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Given:
    """What the caller gave; at most one of the two.

    Attributes:
        image: a file, uint8 [H, W, 3], or a PIL image.
        video: a file, uint8 [F, H, W, 3], or a generated `Video`.
        latents: the clean frames' normalised latents float32 [1 or B, 16, T, H, W], in place of
            what the VAE would make of the image or the video.
        posterior_noise: standard normal, of the clean latents' shape, for the VAE's sample.
    """

    image: ImageSource | None = None
    video: VideoSource | None = None
    latents: torch.Tensor | None = None
    posterior_noise: torch.Tensor | None = None

    def __post_init__(self) -> None:
        refuse_both(self.image, self.video)

    @property
    def nothing(self) -> bool:
        """Whether nothing was given."""
        parts = (self.image, self.video, self.latents, self.posterior_noise)
        return all(part is None for part in parts)

    def pixels(self, job: Job) -> torch.Tensor:
        """The frames that a task starts from, for the VAE: float32 [1, 3, F, H, W] in -1..1.

        Stretched to the task's size, as the original does, and not cropped. Of a video, the last.

        Raises:
            InputError: the file is no image or video.
            UsageError: fewer frames than the task starts from.
        """
        wanted = self.image if job.task == "i2v" else self.video
        if wanted is None:
            given = "an image" if self.image is not None else "a video"
            raise UsageError(
                f"{job.task} starts from {'an image' if job.task == 'i2v' else 'a video'}",
                got="nothing" if self.image is None and self.video is None else given,
            )
        if self.image is not None:
            return resize_video(image_pixels(self.image)[None], job.height, job.width)
        assert self.video is not None, "checked above"
        frames = video_pixels(self.video, last=job.cond_frames)
        if len(frames) < job.cond_frames:
            raise UsageError(
                "the video is too short to continue",
                got=f"{len(frames)} frames (at {CONTINUATION_FPS} per second)",
                wanted=f"at least {job.cond_frames}",
            )
        return resize_video(frames[-job.cond_frames :], job.height, job.width)


@dataclass(frozen=True, eq=False)
class Start:
    """The clean frames in front of the noise: none, latents, or latents that are cached as well.

    latents: normalised, float32 [1 or B, 16, K, H, W].
    """

    latents: torch.Tensor | None = None
    cache: KeyValueCache | None = None

    @property
    def frames(self) -> int:
        """K."""
        return 0 if self.latents is None else self.latents.shape[2]

    def placed(self, device: torch.device, offload: bool) -> "Start":
        """The same with its cache on the device, or on the host."""
        if self.cache is None:
            return self
        return Start(self.latents, self.cache.to("cpu" if offload else device))

    def for_samples(self, count: int) -> torch.Tensor | None:
        """The latents of `count` samples, [B, 16, K, H, W]; UsageError where they are of others."""
        if self.latents is None:
            return None
        if len(self.latents) not in (1, count):
            raise UsageError(
                "the clean latents are of other samples", got=len(self.latents), wanted=count
            )
        return self.latents.expand(count, -1, -1, -1, -1)


def refuse_both(image: object, video: object) -> None:
    """UsageError where a generation or a refinement would start from two things."""
    if image is not None and video is not None:
        raise UsageError("an image and a video were given", do="Give one of them.")


def task_for(task: Task | None, given: Given, cache: KeyValueCache | bool) -> Task:
    """The task that was asked for, or the one that fits what was given.

    Raises:
        UsageError: what was given says nothing of a task, or a cache would not be used.
    """
    fitting = task_of(given, cache) if task is None or isinstance(cache, KeyValueCache) else task
    if task is not None and isinstance(cache, KeyValueCache) and task != fitting:
        raise UsageError("a cache is for a continuation", got=f"task {task}", wanted=fitting)
    return fitting


def task_of(given: Given, cache: KeyValueCache | bool) -> Task:
    """The task that fits what was given."""
    if isinstance(cache, KeyValueCache):
        if not given.nothing:
            raise UsageError("a cache holds its clean frames", do="Give no others.")
        return "vc"
    if given.image is not None:
        return "i2v"
    if given.video is not None:
        return "vc" if cache else "vc-uncached"
    if given.latents is None:
        return "t2v"
    raise UsageError("clean latents alone do not say what they are of", do="Give `task` as well.")


def clean_latents(
    given: Given,
    job: Job,
    generator: torch.Generator,
    encode: Encode,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The clean frames' normalised latents float32 [1 or B, 16, T, H, W].

    Args:
        generator: for the posterior's sample where its noise was not given.
        dtype: what the sample is normalised in, and rounded to; what is given is rounded to it.

    Raises:
        InputError, UsageError: what was given does not do for the task.
    """
    frames = job.num_cond_latents or (job.latent_frames if job.part == "cache" else 0)
    if not frames:
        raise UsageError(f"{job.task} starts from nothing but text")
    channels, _, height, width = job.latent_shape
    shape = (channels, frames, height, width)
    if given.latents is None:
        if given.posterior_noise is not None:
            check_latents("posterior's noise", given.posterior_noise, shape)
        noise = generator if given.posterior_noise is None else given.posterior_noise
        made = encode(given.pixels(job), noise, dtype).float()
        check_latents("clean latents", made, shape)
        return made
    check_latents("clean latents", given.latents, shape)
    return given.latents.to(dtype).float()


def check_latents(what: str, latents: torch.Tensor, shape: tuple[int, ...]) -> None:
    """UsageError unless float32 [B, *shape] and finite."""
    if tuple(latents.shape[1:]) != shape or latents.dtype != torch.float32:
        raise UsageError(
            f"the {what} do not fit",
            got=f"{latents.dtype} {list(latents.shape)}",
            wanted=f"torch.float32 {['B', *shape]}",
        )
    if not torch.isfinite(latents).all():
        raise UsageError(f"the {what} are not finite")


def image_pixels(image: ImageSource) -> Pixels:
    """uint8 [H, W, 3] of a file, an array or a PIL image."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, np.ndarray):
        check_pixels(image[None])
        return image
    if not hasattr(image, "convert"):
        raise UsageError(
            "this is no image", got=type(image).__name__,
            wanted="a file, uint8 [H, W, 3] or a PIL image",
        )  # fmt: skip
    return np.asarray(image.convert("RGB"))


def video_pixels(
    video: VideoSource, fps: float | None = CONTINUATION_FPS, last: int | None = None
) -> Pixels:
    """uint8 [F, H, W, 3] of a file, an array or a generated video.

    Of a file, every so many frames, that it has about `fps` per second; all where None. With `last`
    no more than so many, from the end. A generated video's frames are rounded down, as the original
    hands them on.
    """
    if isinstance(video, str | Path):
        return read_video(video, fps, last)[0]
    if isinstance(video, Video):
        frames = video.frames
        return frames.numpy() if frames.dtype == torch.uint8 else truncated_uint8(frames)
    if isinstance(video, list | tuple) and video:
        return np.stack([image_pixels(frame) for frame in video])
    if not isinstance(video, np.ndarray):
        raise UsageError(
            "this is no video", got=type(video).__name__,
            wanted="a file, uint8 [F, H, W, 3], PIL images or a Video",
        )  # fmt: skip
    check_pixels(video)
    return video
