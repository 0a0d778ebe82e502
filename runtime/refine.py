"""Refinement's preparation: stage one's frames, enlarged, padded and noised part of the way.

Stage one is a finished 480p video. Its frames are enlarged to 720p and, unless the refinement is
spatial only, to twice as many; the sampler starts from their latents, half noise. Frames that are
already refined (a picture, or the end of the segment before) may lead as the condition.

The DiT's sparse attention takes latents in groups of 4, and both parts are padded to that. There
are no models and no random numbers here. F frames of H x W pixels; pixels are [1, 3, F, H, W] in
-1..1.
"""

import numpy as np
import torch
from torch.nn.functional import interpolate

from lcexport.configs.errors import UsageError
from lcexport.configs.refinement import RefineShape
from lcexport.runtime.media import Pixels, check_pixels


def stage_one_pixels(
    frames_FHW3: Pixels,
    size: tuple[int, int],
    new_frames: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Stage one's uint8 frames enlarged to `new_frames` of `size`, [1, 3, F, H, W] in -1..1.

    All of it in `dtype` (the DiT's) and in the original's order, which bfloat16 can tell.

    Args:
        frames_FHW3: uint8, as the first stage's video was rounded.
        size: (height, width) in pixels.
        new_frames: `RefineShape.new_frames`.
        dtype: what is computed in.
        device: where.

    Raises:
        UsageError: these are not frames, or the target is empty.
    """
    check_pixels(frames_FHW3)
    if min(*size, new_frames) < 1:
        raise UsageError("cannot enlarge to nothing", got=f"{new_frames} frames of {size}")
    pixels = torch.from_numpy(np.array(frames_FHW3)).to(device, dtype).permute(0, 3, 1, 2)
    pixels = interpolate(pixels, size, mode="bilinear", align_corners=True)
    pixels = pixels.permute(1, 0, 2, 3)[None] / 255.0
    pixels = interpolate(pixels, (new_frames, *size), mode="trilinear", align_corners=True)
    return pixels * 2 - 1


def pad_stage_one(pixels_13FHW: torch.Tensor, shape: RefineShape) -> torch.Tensor:
    """The enlarged frames with `shape`'s repetitions in front and at the end.

    Raises:
        UsageError: not as many frames as `shape` says.
    """
    if (frames := pixels_13FHW.shape[2]) != shape.new_frames:
        raise UsageError("another number of frames to pad", got=frames, wanted=shape.new_frames)
    return repeat_ends(pixels_13FHW, shape.added_in_front, shape.added_at_end)


def condition_pixels(pixels_13FHW: torch.Tensor, shape: RefineShape) -> torch.Tensor:
    """The condition for the VAE's encoder: the last given frames, the first of them repeated.

    Args:
        pixels_13FHW: the given picture or video, already at the refined size.
        shape: says how many of its last frames are the condition.

    Raises:
        UsageError: there is no condition in `shape`, or there are too few frames for it.
    """
    if not 0 < shape.cond_frames <= pixels_13FHW.shape[2]:
        raise UsageError(
            "the given frames do not make the condition", got=pixels_13FHW.shape[2],
            wanted=f"at least {max(1, shape.cond_frames)}, for a condition of {shape.cond_frames}",
        )  # fmt: skip
    return repeat_ends(pixels_13FHW[:, :, -shape.cond_frames :], shape.added_in_front, 0)


def repeat_ends(pixels_13FHW: torch.Tensor, front: int, back: int) -> torch.Tensor:
    first, last = pixels_13FHW[:, :, :1], pixels_13FHW[:, :, -1:]
    parts = [first.repeat_interleave(front, 2), pixels_13FHW, last.repeat_interleave(back, 2)]
    return torch.cat(parts, 2)


def noised(latents: torch.Tensor, noise: torch.Tensor, t_thresh: float) -> torch.Tensor:
    """(1 - t) * latents + t * noise, in their dtype: where the sampler starts.

    Raises:
        UsageError: t_thresh outside 0..1, or noise of another shape or dtype.
    """
    if not 0 <= t_thresh <= 1:
        raise UsageError("t_thresh is out of range", got=t_thresh, wanted="0..1")
    if (noise.shape, noise.dtype) != (latents.shape, latents.dtype):
        raise UsageError(
            "the noise does not fit the latents", got=f"{noise.dtype} {list(noise.shape)}",
            wanted=f"{latents.dtype} {list(latents.shape)}",
        )  # fmt: skip
    return (1 - t_thresh) * latents + t_thresh * noise
