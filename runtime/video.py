"""A generated video: frames in memory, and the ways out of memory. F frames of H x W pixels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lcexport.configs.errors import UsageError
from lcexport.engines.files import new_file, refuse_existing

if TYPE_CHECKING:
    from PIL.Image import Image

CRF = "18"  # libx264's quality: 0 lossless, 18 hardly distinguishable, 23 the default
THUMBNAIL_PIXELS = 320  # widest picture on a contact sheet
SMALL_PIXELS = 64  # up to this width a picture is shown at twice its size
MARGIN_PIXELS = 6
LABEL_PIXELS = 16


@dataclass(frozen=True, eq=False)
class Video:
    """Frames float32 [F, H, W, 3] in 0..1, or uint8 as files have them; and where they came from.

    fps in frames per second; timings in seconds per stage; seed None where the caller gave
    the initial noise.
    """

    frames: torch.Tensor
    fps: float
    timings: dict[str, float] = field(default_factory=dict)
    seed: int | None = None

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """Frames uint8 [F, H, W, 3], rounded to nearest."""
        return to_uint8(self.frames)

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264, yuv420p, BT.709); it appears whole or not at all.

        Raises:
            UsageError: the suffix is not .mp4, the folder is missing, or the size is odd.
            ResourceError: the file exists, the disk is full, or no permission.
        """
        return save_frames([self.frames], path, self.fps)

    def save_contact_sheet(self, path: str | Path, columns: int = 4, count: int = 8) -> Path:
        """Write `contact_sheet` as a new PNG file, whole or not at all.

        Raises:
            UsageError: the suffix is not .png.
            ResourceError: the file exists, the disk is full, or no permission.
        """
        check_suffix(Path(path), ".png")
        return save_sheet(self.contact_sheet(columns, count), path)

    def contact_sheet(self, columns: int = 4, count: int = 8) -> "Image":
        """`count` evenly spaced frames, first and last included, with their times in seconds.

        Raises:
            UsageError: columns or count below 1.
        """
        if columns < 1 or count < 1:
            raise UsageError(
                "a contact sheet needs a frame", got=f"{columns} columns, {count} frames"
            )
        row = evenly_spaced(self.to_uint8(), self.fps, count)
        return draw_sheet([row.part(i, i + columns) for i in range(0, len(row.labels), columns)])


def to_uint8(frames_FHW3: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Frames in 0..1 as uint8, rounded to nearest; uint8 ones as they are."""
    if frames_FHW3.dtype == torch.uint8:
        return frames_FHW3.cpu().numpy()
    return (frames_FHW3.clip(0, 1) * 255).round().byte().cpu().numpy()


def save_frames(groups: Iterable[torch.Tensor], path: str | Path, fps: float) -> Path:
    """Write an MP4 of frames as they come, [any number, H, W, 3]; whole or not at all.

    A group is encoded, in the codec's own threads, while the next one is made.

    Raises:
        UsageError: the suffix is not .mp4, the folder is missing, the size is odd, or no frame.
        ResourceError: the file exists, the disk is full, or no permission.
    """
    path = Path(path)
    check_place(path)
    refuse_existing(path)
    groups = iter(groups)
    first = next(groups, None)
    if first is None or not len(first):
        raise UsageError("a video needs a frame")
    check_size(tuple(first.shape))
    frames = (frame for group in chain((first,), groups) for frame in to_uint8(group))
    with new_file(path) as file:
        write_mp4(file, frames, Fraction(fps).limit_denominator(1001))
    return path


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a contact sheet: frames uint8 [N, H, W, 3], a label under each, a title above."""

    frames: npt.NDArray[np.uint8]
    labels: list[str]
    title: str = ""

    def part(self, first: int, end: int) -> "Row":
        return Row(self.frames[first:end], self.labels[first:end], self.title)

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of one picture."""
        height, width = self.frames.shape[1:3]
        scale = 2.0 if width <= SMALL_PIXELS else min(1.0, THUMBNAIL_PIXELS / width)
        return max(1, round(width * scale)), max(1, round(height * scale))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of all of it, with the margins to its right and below."""
        width, height = self.cell
        lines = 2 if self.title else 1
        return (
            len(self.labels) * (width + MARGIN_PIXELS),
            height + lines * LABEL_PIXELS + MARGIN_PIXELS,
        )


def evenly_spaced(frames: npt.NDArray[np.uint8], fps: float, count: int, title: str = "") -> Row:
    """`count` of the frames, first and last included, with their times in seconds."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    return Row(frames[chosen], [f"{index / fps:.2f} s" for index in chosen], title)


def draw_sheet(rows: Sequence[Row]) -> "Image":
    """The rows below each other; their pictures may differ in size and number."""
    from PIL import Image, ImageDraw

    widths, heights = zip(*(row.size for row in rows), strict=True)
    sheet = Image.new("RGB", (max(widths) + MARGIN_PIXELS, sum(heights) + MARGIN_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    y = MARGIN_PIXELS
    for row in rows:
        width, height = row.cell
        top = y + (LABEL_PIXELS if row.title else 0)
        draw.text((MARGIN_PIXELS, y), row.title, fill="black")
        for place, (frame, label) in enumerate(zip(row.frames, row.labels, strict=True)):
            x = MARGIN_PIXELS + place * (width + MARGIN_PIXELS)
            sheet.paste(Image.fromarray(frame).resize((width, height)), (x, top))
            draw.text((x, top + height + 2), label, fill="black")
        y += row.size[1]
    return sheet


def save_sheet(sheet: "Image", path: str | Path) -> Path:
    """Write a new PNG file, whole or not at all.

    Raises:
        UsageError: the suffix is not .png.
        ResourceError: the file exists, the disk is full, or no permission.
    """
    path = Path(path)
    check_suffix(path, ".png")
    with new_file(path) as file:
        sheet.save(file, format="PNG")
    return path


def check_target(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse what cannot be written before any file is opened."""
    check_place(path)
    check_size(shape)


def check_place(path: Path) -> None:
    check_suffix(path, ".mp4")
    if not path.parent.is_dir():
        raise UsageError("no such folder", got=path.parent, do="Create it first.")


def check_size(shape: tuple[int, ...]) -> None:
    """Refuse frames [F, H, W, 3] that the codec does not take."""
    if shape[1] % 2 or shape[2] % 2:
        raise UsageError(
            "H.264 with halved colour needs even sizes", got=f"{shape[1]} x {shape[2]} pixels"
        )


def check_suffix(path: Path, suffix: str) -> None:
    """Refuse a file name of another kind."""
    if path.suffix.lower() != suffix:
        raise UsageError(
            "unknown kind of file",
            got=repr(path.name),
            wanted=f"something{suffix}",
        )


def write_mp4(file: object, frames: Iterable[npt.NDArray[np.uint8]], rate: Fraction) -> None:
    """Encode frames uint8 [H, W, 3], at least one, into a seekable binary file.

    The colours are converted to BT.709 and labelled so: players guess at unlabelled video,
    differently by its size.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        for pixels in chain((first,), frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
