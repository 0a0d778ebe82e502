"""A generated video: frames in memory, and the ways out of memory. F frames of H x W pixels."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lcexport.configs.errors import UsageError
from lcexport.engines.files import new_file

if TYPE_CHECKING:
    from PIL.Image import Image

CRF = "18"  # libx264's quality: 0 lossless, 18 hardly distinguishable, 23 the default
THUMBNAIL_PIXELS = 320  # widest picture on a contact sheet
MARGIN_PIXELS = 6
LABEL_PIXELS = 16


@dataclass(frozen=True, eq=False)
class Video:
    """Frames float32 [F, H, W, 3] in 0..1, and where they came from.

    fps in frames per second; timings in seconds per stage; seed None where the caller gave
    the initial noise.
    """

    frames: torch.Tensor
    fps: float
    timings: dict[str, float] = field(default_factory=dict)
    seed: int | None = None

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """Frames uint8 [F, H, W, 3], rounded to nearest."""
        return (self.frames.clip(0, 1) * 255).round().byte().cpu().numpy()

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264, yuv420p, BT.709); it appears whole or not at all.

        Raises:
            UsageError: the suffix is not .mp4, the folder is missing, or the size is odd.
            ResourceError: the file exists, the disk is full, or no permission.
        """
        path = Path(path)
        check_target(path, tuple(self.frames.shape))
        with new_file(path) as file:
            write_mp4(file, self.to_uint8(), Fraction(self.fps).limit_denominator(1001))
        return path

    def save_contact_sheet(self, path: str | Path, columns: int = 4, count: int = 8) -> Path:
        """Write `contact_sheet` as a new PNG file, whole or not at all.

        Raises:
            UsageError: the suffix is not .png.
            ResourceError: the file exists, the disk is full, or no permission.
        """
        path = Path(path)
        check_suffix(path, ".png")
        with new_file(path) as file:
            self.contact_sheet(columns, count).save(file, format="PNG")
        return path

    def contact_sheet(self, columns: int = 4, count: int = 8) -> "Image":
        """`count` evenly spaced frames, first and last included, with their times in seconds.

        Raises:
            UsageError: columns or count below 1.
        """
        from PIL import Image, ImageDraw

        if columns < 1 or count < 1:
            raise UsageError(
                "a contact sheet needs a frame", got=f"{columns} columns, {count} frames"
            )
        frames = self.to_uint8()
        chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
        height, width = frames.shape[1:3]
        scale = min(1.0, THUMBNAIL_PIXELS / width)
        cell_w, cell_h = max(1, round(width * scale)), max(1, round(height * scale))
        step_x, step_y = cell_w + MARGIN_PIXELS, cell_h + LABEL_PIXELS + MARGIN_PIXELS
        columns = min(columns, len(chosen))
        rows = -(-len(chosen) // columns)
        size = (columns * step_x + MARGIN_PIXELS, rows * step_y + MARGIN_PIXELS)
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for place, index in enumerate(chosen):
            x = MARGIN_PIXELS + place % columns * step_x
            y = MARGIN_PIXELS + place // columns * step_y
            sheet.paste(Image.fromarray(frames[index]).resize((cell_w, cell_h)), (x, y))
            draw.text((x, y + cell_h + 2), f"{index / self.fps:.2f} s", fill="black")
        return sheet


def check_target(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse what cannot be written before any file is opened."""
    check_suffix(path, ".mp4")
    if not path.parent.is_dir():
        raise UsageError("no such folder", got=path.parent, do="Create it first.")
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
