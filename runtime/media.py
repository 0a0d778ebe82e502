"""Given pictures and videos: from a file to uint8 pixels, and to what the VAE's encoder takes.

F frames of H x W pixels. Pixels are numpy uint8 [H, W, 3] or [F, H, W, 3] in RGB; the model's are
torch float32 [1, 3, F, H, W] in -1..1.
"""

import logging
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from lcexport.configs.errors import InputError, ResourceError, UsageError
from lcexport.engines.host import available_memory_bytes
from lcexport.runtime.loading import library_errors

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from PIL.Image import Image

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

# Only these: both libraries also know formats that run programs or open other files by name
# (PostScript, playlists), and one that paints any text file as a film.
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
CONTAINERS = "mov,matroska,avi,gif"  # MP4 is one of mov's names, WebM one of matroska's
CONTINUATION_FPS = 15  # what the model makes
REFINED_FPS = 30
COPIES = 4  # of a video's frames that may be in memory: while they are stacked, resized or joined
MICROSECONDS = 1_000_000  # a container's unit of time, in a second


def read_image(path: str | Path) -> Pixels:
    """A picture as RGB, uint8 [H, W, 3], the way a viewer shows it.

    The EXIF orientation is applied. Transparency is dropped as the original drops it, with a
    warning: what lies under the transparent pixels comes to light. Of an animation, the first
    picture is taken.

    Raises:
        InputError: no such file, a folder, damaged, no picture, or more than 8 bits in one channel.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    with opened(path, "picture") as file, Image.open(file, formats=PICTURES) as image:
        image.load()
        if image.mode.startswith(("I", "F")):  # converting would clip, not scale
            raise InputError(f"{path} has too deep pixels", got=image.mode, wanted="8 bits each")
        if is_transparent(image):
            log.warning("%s is transparent in places: its transparency is dropped", path)
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def is_transparent(image: "Image") -> bool:
    if not image.has_transparency_data:
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def read_video(
    path: str | Path, target_fps: float | None = None, last: int | None = None
) -> tuple[Pixels, float]:
    """A video as RGB, uint8 [F, H, W, 3], and its file's own frames per second.

    A camera's rotation is applied. With `target_fps`, every `frame_stride`-th frame is kept, from
    the first on; the frames per second returned are still the file's. With `last`, only so many
    from the end are kept in memory. A Matroska file that was
    cut short is read as far as it goes: nothing in it tells.

    Raises:
        InputError: no such file, a folder, damaged, no video in it, or no frames.
        ResourceError: what is kept would take too much of the memory that is free; where the file
            says how long it is, before anything is decoded.
    """
    import av

    path = Path(path)
    options = {"format_whitelist": CONTAINERS}
    with opened(path, "video") as file, av.open(file, "r", options=options) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no pictures in it", wanted="a video")
        stream = container.streams.video[0]
        if not (rate := stream.average_rate or stream.guessed_rate):
            raise InputError(f"{path} does not say its frames per second")
        stride = 1 if target_fps is None else frame_stride(float(rate), target_fps)
        room = available_memory_bytes() // COPIES
        count = min(-(-foretold(container, stream) // stride), last or sys.maxsize)
        refuse_large(path, count, count * stream.height * stream.width * 3, room)
        whole = enumerate(whole_frames(path, container, stream))
        kept = (upright(frame) for number, frame in whole if number % stride == 0)
        frames = deque(kept if last else within(path, kept, room), maxlen=last)
        if not frames:
            raise InputError(f"{path} has no frames in it")
        return np.stack(frames), float(rate)


def foretold(container: "InputContainer", stream: "VideoStream") -> int:
    """How many frames a file says it has; 0 where it does not say."""
    if stream.frames or not container.duration or not stream.average_rate:
        return stream.frames
    return int(container.duration / MICROSECONDS * stream.average_rate)


def within(path: Path, frames: Iterator[Pixels], room: int) -> Iterator[Pixels]:
    """Frames as they come, until they are too many: not every file says how many it has."""
    held = 0
    for number, frame in enumerate(frames, 1):
        held += frame.nbytes
        refuse_large(path, number, held, room)
        yield frame


def refuse_large(path: Path, count: int, size: int, room: int) -> None:
    if size > room:
        raise ResourceError(
            f"{path} is too long to be held in memory",
            got=f"{count} frames or more, {size / 1e9:.2f} GB",
            wanted=f"at most {room / 1e9:.2f} GB, a quarter of what is free",
            do="Give a part of it, or a smaller copy.",
        )


def whole_frames(
    path: Path, container: "InputContainer", stream: "VideoStream"
) -> Iterator["VideoFrame"]:
    """Decode one after the other: decoding several at once keeps the decoder's errors back."""
    for packet in container.demux(stream):
        frames = packet.decode()
        if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
            raise InputError(f"{path} is damaged or cut short", do="Copy the file again.")
        yield from frames


def upright(frame: "VideoFrame") -> Pixels:
    """uint8 [H, W, 3]. The camera's rotation is metadata, counter-clockwise in degrees."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    return np.rot90(pixels, round(frame.rotation / 90))


def frame_stride(fps: float, target_fps: float = CONTINUATION_FPS) -> int:
    """Which frames of a video to keep for the model: every so many, as the original counts.

    Raises:
        UsageError: a rate is not above 0.
    """
    if not (fps > 0 and target_fps > 0):
        raise UsageError("frames per second must be above 0", got=f"{fps} and {target_fps}")
    return max(1, round(fps / target_fps))


@contextmanager
def opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """The file; whatever a library raises over it becomes an InputError.

    The libraries get it open, not its name: a name could make them open something else.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder", wanted=f"a {what}")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", wanted=f"a {what}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", wanted=f"a {what}") from error
    with file, library_errors(what, path, f"Check that it opens elsewhere as a {what}."):
        yield file


def resize_video(frames_FHW3: Pixels, height: int, width: int) -> torch.Tensor:
    """A video for the VAE's encoder, float32 [1, 3, F, H, W] in -1..1.

    Each frame is stretched to the size with the original's filter (PIL, Lanczos), not cropped.
    """
    from PIL.Image import Resampling

    resized = resize_frames(frames_FHW3, height, width, Resampling.LANCZOS)
    pixels_FHW3 = torch.from_numpy(resized).float().div(255)
    return (2 * pixels_FHW3 - 1).permute(3, 0, 1, 2)[None].contiguous()


def resize_frames_bicubic(frames_FHW3: Pixels, height: int, width: int) -> Pixels:
    """Frames back at their source's size, uint8 [F, H, W, 3]: PIL, bicubic, as the original."""
    from PIL.Image import Resampling

    return resize_frames(frames_FHW3, height, width, Resampling.BICUBIC)


def resize_frames(frames_FHW3: Pixels, height: int, width: int, resample: Any) -> Pixels:
    from PIL import Image

    check_pixels(frames_FHW3)
    if height < 1 or width < 1:
        raise UsageError("cannot resize to nothing", got=f"{height} x {width} pixels")
    resized = np.empty((len(frames_FHW3), height, width, 3), np.uint8)
    for frame, target in zip(frames_FHW3, resized, strict=True):
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), resample))
    return resized


def check_pixels(frames_FHW3: Pixels) -> None:
    """Refuse what are not frames."""
    shape = frames_FHW3.shape
    if frames_FHW3.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UsageError(
            "these are not frames", got=f"{frames_FHW3.dtype} {list(shape)}",
            wanted="uint8 [F, H, W, 3] with at least one pixel",
        )  # fmt: skip


def truncated_uint8(frames: torch.Tensor) -> Pixels:
    """Frames in 0..1 as uint8 of the same shape, rounded down.

    So the original hands frames from one stage or segment to the next. A saved video is rounded
    to nearest (`Video.to_uint8`).
    """
    return (frames.clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
