"""Long videos: segments that each continue the one before.

Nothing but a folder is carried from segment to segment: each reads its first frames from the file
of the one before, whether that was made just now or by a process that was killed.

The original goes through all segments with one random generator. Here every segment has a seed of
its own, made of the request's seed and the segment's number, so that a continued run draws the
numbers of an uninterrupted one. The first segment's is the request's own.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job
from lcexport.engines.manifest import GraphRecord
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.conditioning import (
    Given,
    ImageSource,
    VideoSource,
    image_pixels,
    video_pixels,
)
from lcexport.runtime.generating import Options
from lcexport.runtime.media import Pixels, resize_frames, truncated_uint8
from lcexport.runtime.pipeline import Pipeline
from lcexport.runtime.request import check_whole, drawn_noise, request_from
from lcexport.runtime.sampler import OnStep
from lcexport.runtime.segments import (
    Frames,
    Journal,
    LongVideo,
    OnSegment,
    SegmentFolder,
    fingerprint,
    open_segments,
    segment_seed,
    unfinished,
)

SEGMENTS = 12  # of the original's demo: one, and eleven that continue it
MOST = 999


def generate_long(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    folder: str | Path,
    *,
    segments: int | None = None,
    negative_prompt: str | None = None,
    image: ImageSource | None = None,
    video: VideoSource | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    distill: bool = False,
    enhance_hf: bool | None = None,
    uint8: bool = True,
    on_segment: OnSegment | None = None,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> LongVideo:
    """Make a long video, or go on with one: the same call again continues what was interrupted.

    With more prompts than before, or other ones for segments that are not finished, it is extended.

    Args:
        prompts: one for all segments, or one for each.
        folder: for the finished segments; new, empty, or this same request's.
        segments: how many to generate; None for one per prompt, or 12 of a single prompt.
        image: the first frame of the first segment.
        video: what the first segment continues. The long video begins with all of it, stretched
            to the pipeline's size.
        enhance_hf: of the segments that continue: end in ten uniform steps. True unless distilled.
        uint8: hand frames on rounded down to uint8, as the original does; otherwise float32, in
            files four times as large.
        on_segment: called with the number of finished segments and that of all, first with what
            was finished before.
        cancel: stops before the next call of the engine; the finished segments stay.
        negative_prompt, seed, steps, guidance_scale, distill, on_step: as in `Pipeline.generate`.

    Raises:
        UsageError: an argument is out of range, the bundle was not built for a task that is
            needed, or the folder holds something else.
        IntegrityError: a finished segment is damaged.
        InputError, VerificationError, Cancelled: as `Pipeline.generate`.
        LockedError, ResourceError: the folder is in use, or cannot be written.
    """
    texts = prompts_for(prompts, segments)
    request = request_from(
        pipe.preset, texts, negative_prompt, seed=seed, steps=steps,
        guidance_scale=guidance_scale, distill=distill, task="vc", enhance_hf=enhance_hf,
    )  # fmt: skip
    given = Given(image, video)
    graphs = graphs_for(pipe, given, len(texts))
    picture = None if image is None else image_pixels(image)
    source = None if video is None else source_frames(pipe.graph("vc").job, video)
    sampling = {
        "steps": request.steps, "guidance_scale": request.guidance_scale, "distill": distill,
    }  # fmt: skip
    asked = {
        "prompts": texts, "negative_prompt": negative_prompt or "", "seed": seed, **sampling,
        "enhance_hf": request.enhance_hf, "uint8": uint8, "image": digest(picture),
        "video": digest(source), **fingerprint(pipe.bundle, graphs),
    }  # fmt: skip
    negative = None if request.negatives is None else negative_prompt
    preset, cancel = pipe.preset, cancel or CancelToken()
    journal = Journal(fps=preset.fps, height=preset.height, width=preset.width, request=asked)
    before = 0 if source is None else 1  # the source is a segment that nobody generates

    def kept(found: Journal) -> int | None:
        finished = found.request["prompts"][: max(0, len(found.segments) - before)]
        return len(found.segments) if finished == texts[: len(finished)] else None

    with open_segments(Path(folder), journal, "prompts", kept) as made:
        if source is not None and not made.count:
            made.add(source, 0)
        for number in unfinished(made.count - before, len(texts), on_segment, cancel):
            options = Options(
                **sampling,  # pyright: ignore[reportArgumentType]  # its keys are options
                seed=segment_seed(seed, "segment", number),
                on_step=on_step,
                cancel=cancel,
            )
            options = begin_segment(pipe, made, picture, request.enhance_hf, options)
            add_segment(pipe, made, texts[number], negative, options, uint8)
    return made.video


def begin_segment(
    pipe: Pipeline, made: SegmentFolder, image: Pixels | None, enhance_hf: bool, options: Options
) -> Options:
    """The options of the next segment, with what it begins with."""
    if not made.count:
        return options if image is None else {**options, "image": image}
    frames = made.video.last(pipe.graph("vc").job.cond_frames)
    options = {**options, "task": "vc", "enhance_hf": enhance_hf}
    if frames.dtype == np.uint8:
        return {**options, "video": np.asarray(frames, np.uint8)}
    return {**options, "cond_latents": unrounded_latents(pipe, frames, options.get("seed", 0))}


def unrounded_latents(pipe: Pipeline, frames: Frames, seed: int) -> torch.Tensor:
    """Latents of float32 frames [F, H, W, 3], with the random numbers that uint8 frames get."""
    shape, stored = (1, *pipe.preset.latent_shape), pipe.components.stored("vc")
    generator, _ = drawn_noise(seed, shape, stored)
    pixels_3FHW = (2 * torch.from_numpy(frames) - 1).permute(3, 0, 1, 2)
    with torch.no_grad():
        pixels_13FHW = pixels_3FHW[None].contiguous()
        return pipe.components.encode_frames(pixels_13FHW, generator, stored).float()


def add_segment(
    pipe: Pipeline,
    made: SegmentFolder,
    prompt: str,
    negative_prompt: str | None,
    options: Options,
    uint8: bool,
) -> None:
    """Generate a segment and save it; nothing of it stays in memory."""
    frames = pipe.generate(prompt, negative_prompt, **options).frames
    skipped = pipe.graph("vc").job.cond_frames if made.count else 0
    made.add(truncated_uint8(frames) if uint8 else frames.cpu().numpy(), skipped)


def prompts_for(prompts: str | Sequence[str], segments: int | None) -> list[str]:
    """A prompt for every segment; UsageError where their numbers do not match."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise UsageError("no prompt was given", got="an empty list")
    if segments is None:
        segments = SEGMENTS if len(texts) == 1 else len(texts)
    check_whole("segments", segments, 1, MOST)
    if len(texts) not in (1, segments):
        raise UsageError(
            "the number of prompts is not that of the segments",
            got=f"{len(texts)} prompts for {segments} segments",
            wanted="one for all, or one for each",
        )
    return texts * segments if len(texts) == 1 else texts


def graphs_for(pipe: Pipeline, given: Given, segments: int) -> list[GraphRecord]:
    """The graphs that will be used; UsageError where the bundle lacks one."""
    graphs = []
    if given.video is None:
        graphs.append(pipe.graph("t2v" if given.image is None else "i2v"))
    if given.video is not None or segments > 1:
        graphs += [pipe.graph("vc", "cache"), pipe.graph("vc")]
    return graphs


def source_frames(job: Job, video: VideoSource) -> Pixels:
    """A given video at the pipeline's size, as continuing it would resize its last frames."""
    from PIL.Image import Resampling

    frames = video_pixels(video)
    Given(video=frames).pixels(job)  # long enough?
    return resize_frames(frames, job.height, job.width, Resampling.LANCZOS)


def digest(pixels: Pixels | None) -> str | None:
    """SHA-256 of the size and the pixels of what was given."""
    if pixels is None:
        return None
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
