"""Given pictures and videos: read once, before an engine is opened, to choose and to refuse by.

Imported inside the commands: it needs torch. F frames of H x W pixels.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lcexport.configs.buckets import bucket
from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job, Task, build_words
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import GraphRecord
from lcexport.runtime.conditioning import Given, task_of
from lcexport.runtime.media import (
    CONTINUATION_FPS,
    REFINED_FPS,
    Pixels,
    read_image,
    read_video,
    resize_frames_bicubic,
)
from lcexport.runtime.refining import fits, refinement_task, stage_one_frames
from lcexport.runtime.video import Video


@dataclass(frozen=True, eq=False)
class Source:
    """What a generation starts from beside its prompt; at most one of the two.

    Attributes:
        image: uint8 [H, W, 3].
        video: uint8 [F, H, W, 3], at about 15 frames per second.
        task: the one that fits.
    """

    image: Pixels | None
    video: Pixels | None
    task: Task

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W); None where there is only text."""
        for pixels in (self.image, self.video):
            if pixels is not None:
                return pixels.shape[-3], pixels.shape[-2]
        return None

    def check(self, job: Job) -> None:
        """What the generation would refuse of it later: a video that is too short, for one."""
        if self.size:
            Given(self.image, self.video).pixels(job)


def read_source(
    image: Path | None, video: Path | None, cache: bool, last: int | None = None
) -> Source:
    """The files' pixels; of a video no more than the last so many frames.

    Raises:
        UsageError: both were given.
        InputError: the file is no image or video.
    """
    task = task_of(Given(image, video), cache)
    frames = None if video is None else read_video(video, CONTINUATION_FPS, last)[0]
    return Source(None if image is None else read_image(image), frames, task)


def check_continuation(video: Path | None, **given: bool) -> None:
    """Refuse options that are for continuations where there is nothing to continue."""
    for name, is_given in given.items():
        if is_given and video is None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is for continuations", do="Give --video as well.")
    if given["no_cache"] and given["offload_cache"]:
        raise UsageError("--offload-cache needs the cache", do="Leave --no-cache out.")


def check_joined(source: Source) -> None:
    """Refuse early what H.264 would refuse of a source that is written in front."""
    if source.video is not None and any(side % 2 for side in source.video.shape[1:3]):
        height, width = source.video.shape[1:3]
        raise UsageError(
            "a video of odd size cannot be written in front of what is made: H.264 needs even ones",
            got=f"{height} x {width} pixels",
            do="Give --only-new.",
        )


def graph_for(bundle: Bundle, res: str | None, source: Source) -> GraphRecord:
    """The graph of the resolution that was asked for, or that the original's rule chooses.

    Raises:
        UsageError: the bundle has none of that name, or none of the source's shape.
    """
    if res is not None:
        return bundle.job_graph(res, source.task)
    if source.size is not None:
        return graph_by_shape(bundle, source.task, source.size)
    return first_for(bundle, source.task)


def built_for(bundle: Bundle, task: Task) -> list[GraphRecord]:
    """The graphs that do a task, one for each resolution."""
    graphs = bundle.manifest.graphs.values()
    return [graph for graph in graphs if (graph.job.task, graph.job.part) == (task, "denoise")]


def first_for(bundle: Bundle, task: Task) -> GraphRecord:
    """The first resolution's graph for a task; UsageError where there is none."""
    found = built_for(bundle, task) or list(bundle.manifest.graphs.values())
    return bundle.job_graph(found[0].preset.name, task)


def graph_by_shape(bundle: Bundle, task: Task, size: tuple[int, int]) -> GraphRecord:
    """The graph of the bucket that the original would stretch this size to."""
    wanted = bucket("480p", *size)
    built = built_for(bundle, task)
    for graph in built:
        if (graph.preset.height, graph.preset.width) == wanted:
            return graph
    name = resolution_of(wanted, list(bundle.manifest.graphs.values()))
    if not built:
        return bundle.job_graph(name, task)
    raise UsageError(
        f"the bundle has no resolution for {size[0]} x {size[1]} pixels",
        got=", ".join(graph.preset.name for graph in built),
        wanted=f"{wanted[0]} x {wanted[1]}, the nearest shape of the model's",
        do=f"Add it: {bundle.adding(name, task)} (or stretch to one the bundle has: --res NAME)",
    )


def resolution_of(size: tuple[int, int], graphs: Sequence[GraphRecord]) -> str:
    """What to call a size when building: as the bundle does, or written out."""
    for graph in graphs:
        if (graph.preset.height, graph.preset.width) == size:
            return graph.preset.name
    return f"{size[0]}x{size[1]}x{graphs[0].preset.frames}"


def check_cond_frames(bundle: Bundle, job: Job, asked: int | None) -> None:
    """UsageError unless the graph starts from as many frames as were asked for."""
    if asked not in (None, job.cond_frames):
        name = job.preset.name
        options = {**bundle.manifest.options_for(name, job.task), "cond_frames": asked}
        raise UsageError(
            f"the bundle continues from another number of frames at {name}",
            got=f"--cond-frames {asked}",
            wanted=job.cond_frames,
            do="Build another: lcexport build "
            f"{shlex.join(build_words(name, job.task, options))} -o ANOTHER",
        )


def joined(before: Pixels, made: Video, cond_frames: int) -> Video:
    """A source and its continuation, at the source's size, as the original's demo writes it.

    Args:
        before: the source's frames.
        made: the continuation, whose first `cond_frames` are the source's last ones.
    """
    _, height, width, _ = before.shape
    after = resize_frames_bicubic(made.to_uint8()[cond_frames:], height, width)
    frames = torch.from_numpy(np.concatenate([before, after]))
    return Video(frames, made.fps, made.timings, made.seed)


@dataclass(frozen=True, eq=False)
class FirstStage:
    """What a refinement starts from.

    Attributes:
        frames: the video to refine, uint8 [F, H, W, 3].
        image: the picture it was generated from, uint8 [H, W, 3].
        before: refined frames that it goes on from, uint8 [F, H, W, 3].
        task: the one that fits.
    """

    frames: Pixels
    image: Pixels | None
    before: Pixels | None
    task: Task

    def check(self, bundle: Bundle, job: Job) -> None:
        """What the refinement would refuse of it later.

        Raises:
            UsageError: not a video of the first stage, or too few frames before it.
        """
        stage_one_frames(self.frames, job, bundle)
        if self.before is not None and len(self.before) < job.cond_frames:
            raise UsageError(
                "the video before is too short to go on from",
                got=f"{len(self.before)} frames",
                wanted=f"at least {job.cond_frames}",
            )


def read_first_stage(
    video: Path, image: Path | None, cond_video: Path | None, spatial: bool, last: int | None
) -> FirstStage:
    """The files' pixels; of the refined video before, the `last` frames.

    Raises:
        UsageError: both an image and a video were given to go on from.
        InputError: a file is no image or video.
    """
    task = refinement_task(image, cond_video, spatial)
    fps = CONTINUATION_FPS if spatial else REFINED_FPS
    return FirstStage(
        read_video(video)[0],
        None if image is None else read_image(image),
        None if cond_video is None else read_video(cond_video, fps, last)[0],
        task,
    )


def refinement_for(bundle: Bundle, res: str | None, given: FirstStage) -> GraphRecord:
    """The graph that refines videos of this size and length, checked against all that is given.

    Raises:
        UsageError: the bundle has no such graph, or it takes other videos.
    """
    graph = first_for(bundle, given.task) if res is None else bundle.job_graph(res, given.task)
    if res is None:
        for built in built_for(bundle, given.task):
            frames, height, width, _ = given.frames.shape
            size = (built.preset.height, built.preset.width)
            if size == (height, width) and fits(built.job, frames):
                graph = built
    given.check(bundle, graph.job)
    return graph
