"""Refinement of a long video, window by window; continued after an interruption as its making is.

A window is as long as one generation, and overlaps the next by the frames that segments share. The
first is refined from nothing, each other goes on from the last refined frames before it.
"""

import hashlib
import math
from pathlib import Path

import numpy as np

from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Task, refine_task
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.media import Pixels, truncated_uint8
from lcexport.runtime.pipeline import Pipeline
from lcexport.runtime.refining import STEPS, THRESHOLD, RefineOptions
from lcexport.runtime.request import MAX_SEED, check_whole
from lcexport.runtime.sampler import OnStep
from lcexport.runtime.schedule import MAX_STEPS
from lcexport.runtime.segments import (
    Journal,
    LongVideo,
    OnSegment,
    fingerprint,
    open_segments,
    segment_seed,
    unfinished,
)
from lcexport.runtime.video import Video


def refine_long(
    pipe: Pipeline,
    video: LongVideo,
    folder: str | Path,
    *,
    spatial: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    t_thresh: float = THRESHOLD,
    on_segment: OnSegment | None = None,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> LongVideo:
    """Refine a long video, or go on with it: the same call again continues.

    Where the video has become longer since, its windows stay, but for one that was filled up. No
    prompt is used. A last window that is too short is filled up with its last frame; what the
    repetitions become is not shown.

    Args:
        video: from `generate_long`, of this pipeline's size.
        folder: for the refined windows; not the one of `video`.
        spatial: keep the number of frames; otherwise it doubles.
        seed, steps, t_thresh: as in `Pipeline.refine`.
        on_segment, on_step, cancel: as in `generate_long`.

    Raises:
        UsageError: an argument is out of range, the bundle was not built for refinement, or the
            folder holds something else.
        IntegrityError: a finished segment or window is damaged.
        VerificationError, Cancelled, LockedError, ResourceError: as `generate_long`.
    """
    check_whole("seed", seed, 0, MAX_SEED)
    check_whole("steps", steps, 1, MAX_STEPS)
    preset = pipe.preset
    if video.shape[1:3] != (preset.height, preset.width):
        raise UsageError(
            "the long video is of another size", got=f"{video.shape[1]} x {video.shape[2]} pixels",
            wanted=f"{preset.height} x {preset.width}",
        )  # fmt: skip
    video.check()
    graphs = [pipe.graph(task) for task in refine_tasks(spatial, video.frames > preset.frames)]
    rate = 1 if spatial else 2
    stride = preset.frames - graphs[-1].job.cond_frames // rate
    windows = 1 + max(0, math.ceil((video.frames - preset.frames) / stride))
    shown = digests(video)
    asked = {
        "seed": seed, "steps": steps, "t_thresh": t_thresh, "spatial": spatial,
        "video": shown,
        **fingerprint(pipe.bundle, graphs),
    }  # fmt: skip
    job, cancel = graphs[-1].job, cancel or CancelToken()
    journal = Journal(fps=video.fps * rate, height=job.height, width=job.width, request=asked)

    def kept(found: Journal) -> int | None:
        before = found.request["video"]
        if not isinstance(before, list):  # the folder is a generation's
            return None
        whole = [s for s in found.segments if s.skipped + s.frames == preset.frames * rate]
        return len(whole) if before == shown[: len(before)] else None

    with open_segments(Path(folder), journal, "video", kept) as made:
        for number in unfinished(made.count, windows, on_segment, cancel):
            options = RefineOptions(
                seed=segment_seed(seed, "window", number),
                spatial=spatial,
                steps=steps,
                t_thresh=t_thresh,
                on_step=on_step,
                cancel=cancel,
            )
            frames, there = window(video, number * stride, preset.frames)
            skipped = job.cond_frames if number else 0
            if number:
                options["cond_video"] = np.asarray(made.video.last(skipped), np.uint8)
            refined = pipe.refine(frames, "", **options)
            assert isinstance(refined, Video), "videos are the default"
            made.add(truncated_uint8(refined.frames), skipped, there * rate - skipped)
            del refined  # or it stays while the next one is made
    return made.video


def refine_tasks(spatial: bool, several: bool) -> list[Task]:
    """The tasks of the first window and, where there are several, of the others."""
    return [refine_task(spatial), *([refine_task(spatial, "vc")] if several else [])]


def window(video: LongVideo, start: int, count: int) -> tuple[Pixels, int]:
    """`count` frames from `start` on, and how many of them are there: the last one is repeated."""
    frames = video.read(start, min(start + count, video.frames))
    missing = count - len(frames)
    return np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]), len(frames)


def digests(video: LongVideo) -> list[str]:
    """For each segment of a long video, a SHA-256 that stands for its frames."""
    segments = (segment.model_dump_json() for segment in video.journal.segments)
    return [hashlib.sha256(text.encode()).hexdigest() for text in segments]
