"""Segments of a long video in a folder: a file for each, and the journal that lists them.

    journal.json              what was asked for, and which segments are finished
    000.safetensors, 001...   `frames` [F, H, W, 3] of one segment, uint8, or float32 in 0..1

A segment is finished when the journal has it. Its first frames may be the last ones of the segment
before, which the finished video does not show twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from lcexport.configs.errors import LockedError, UsageError
from lcexport.engines.bundle import Bundle, check_file
from lcexport.engines.files import new_file, resource_errors, sha256_of, write_bytes
from lcexport.engines.folders import FolderLock
from lcexport.engines.manifest import COMPONENTS, WEIGHTS, FileRecord, GraphRecord
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.journal import (
    JOURNAL,
    Journal,
    Kept,
    Segment,
    check_same,
    read_journal,
    write_journal,
)
from lcexport.runtime.media import Pixels, truncated_uint8
from lcexport.runtime.video import Video, check_target, write_mp4

Frames = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
OnSegment = Callable[[int, int], object]  # finished, wanted


@dataclass(frozen=True)
class LongVideo:
    """The finished segments of a folder as one video, read from their files when asked for."""

    folder: Path
    journal: Journal

    @property
    def frames(self) -> int:
        """How many, none counted twice."""
        return sum(segment.frames for segment in self.journal.segments)

    @property
    def fps(self) -> float:
        return self.journal.fps

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3)."""
        return (self.frames, self.journal.height, self.journal.width, 3)

    def check(self) -> None:
        """Compare every segment's file with the journal; IntegrityError names one that differs."""
        do = f"Restore the file, or move {self.folder} away and start again."
        for segment in self.journal.segments:
            check_file(self.folder / segment.file, segment.record, hashed=True, do=do)

    def read(self, start: int, stop: int) -> Pixels:
        """Frames `start` to `stop` as uint8 [F, H, W, 3]; float32 ones are rounded down."""
        parts, before = [], 0
        for segment in self.journal.segments:
            first, last = max(start - before, 0), min(stop - before, segment.frames)
            if first < last:
                with self._opened(segment) as frames:
                    part = frames[segment.skipped + first : segment.skipped + last]
                parts.append(part if part.dtype == np.uint8 else truncated_uint8(tensor(part)))
            before += segment.frames
        return np.concatenate(parts)

    def last(self, count: int) -> Frames:
        """The last frames of the last segment's file, as they were made."""
        segment = self.journal.segments[-1]
        with self._opened(segment) as frames:
            return frames[frames.get_shape()[0] - count :]

    def pixels(self) -> Iterator[Pixels]:
        """Every frame, uint8 [H, W, 3], one at a time; float32 ones are rounded to nearest."""
        for segment in self.journal.segments:
            with self._opened(segment) as frames:
                for place in range(segment.skipped, segment.skipped + segment.frames):
                    frame = frames[place : place + 1]
                    if frame.dtype != np.uint8:
                        frame = Video(tensor(frame), self.fps).to_uint8()
                    yield frame[0]

    def save(self, path: str | Path) -> Path:
        """Write an MP4 frame by frame, as `Video.save` does.

        Raises:
            UsageError: the suffix is not .mp4, the folder is missing, or the size is odd.
            IntegrityError: a segment's file is missing or damaged.
            ResourceError: the file exists, the disk is full, or no permission.
        """
        path = Path(path)
        check_target(path, self.shape)
        self.check()
        with new_file(path) as file:
            write_mp4(file, self.pixels(), Fraction(self.fps).limit_denominator(1001))
        return path

    @contextmanager
    def _opened(self, segment: Segment) -> Iterator[Any]:
        """The frames of a file; slicing reads them."""
        with safe_open(self.folder / segment.file, "np") as file:
            yield file.get_slice("frames")


class SegmentFolder:
    """A folder that segments are being added to; `open_segments` makes it.

    Attributes:
        video: what is finished.
    """

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.video = LongVideo(folder, journal)

    @property
    def count(self) -> int:
        return len(self.video.journal.segments)

    def add(self, frames: Frames, skipped: int, shown: int | None = None) -> None:
        """Save a segment [F, H, W, 3], of which so many frames are shown; then it is finished."""
        folder, journal = self.video.folder, self.video.journal
        path = folder / f"{self.count:03}.safetensors"
        # a file of that name was written just before a kill: the journal does not have it
        write_bytes(path, to_safetensors({"frames": np.ascontiguousarray(frames)}), replace=True)
        record = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        shown = len(frames) - skipped if shown is None else shown
        segment = Segment(file=path.name, record=record, skipped=skipped, frames=shown)
        journal = journal.model_copy(update={"segments": (*journal.segments, segment)})
        write_journal(folder, journal)
        self.video = LongVideo(folder, journal)


def unfinished(
    finished: int, wanted: int, on_segment: OnSegment | None, cancel: CancelToken
) -> Iterator[int]:
    """The numbers of the segments to make, one after the other; Cancelled between two of them."""
    for number in range(finished, wanted):
        if on_segment:
            on_segment(number, wanted)
        cancel.check()
        yield number
    if on_segment:
        on_segment(wanted, wanted)


def segment_seed(seed: int, kind: str, number: int) -> int:
    """The seed of one segment or window: the request's for the first, made of all three then."""
    if not number:
        return seed
    hashed = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def fingerprint(bundle: Bundle, graphs: Iterable[GraphRecord]) -> dict[str, Any]:
    """What of a bundle decides the frames: weights, of all its models, and graphs."""
    files = bundle.manifest.files.items()
    used = {name: r.sha256 for name, r in files if name.startswith((WEIGHTS, *COMPONENTS))}
    jobs = {graph.name: graph.job.model_dump(mode="json") for graph in graphs}
    return {"weights": used, "graphs": jobs}


@contextmanager
def open_segments(
    folder: Path, wanted: Journal, grows: str = "", kept: Kept = lambda found: None
) -> Iterator[SegmentFolder]:
    """A folder for this journal's request: new, empty, or with the request's first segments in it.

    It is locked until the block ends, or the process does.

    Args:
        grows: what of the request may be more than it was when the folder was begun.
        kept: how many of a folder's segments are those of the request that has grown; None where
            it is another one.

    Raises:
        UsageError: the folder holds another request's segments, or other files.
        IntegrityError: the journal or a finished segment is damaged.
        IncompatibleError: the journal has another schema version.
        LockedError: another process is at work in the folder.
        ResourceError: the folder cannot be written.
    """
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock()
    try:
        lock.take(folder, folder)
    except LockedError as error:
        raise LockedError(
            f"another process is making the segments in {folder}", do="Wait, or name another."
        ) from error
    try:
        for left in folder.glob(".*.partial"):  # by a process that was killed
            left.unlink()
        yield SegmentFolder(folder, continued(folder, wanted, grows, kept))
    finally:
        lock.release()


def continued(folder: Path, wanted: Journal, grows: str, kept: Kept) -> Journal:
    """The folder's journal, with the request as it is now; a new one in an empty folder."""
    path = folder / JOURNAL
    if not path.exists():
        if other := next(folder.iterdir(), None):
            raise UsageError(
                "the folder for segments holds something else", got=other,
                wanted="a new or empty folder, or one of the same request",
            )  # fmt: skip
        write_journal(folder, wanted)
        return wanted
    found = read_journal(path)
    asked = json.loads(wanted.model_dump_json())["request"]
    there, count = found.request, len(found.segments)
    if there.get(grows) != asked.get(grows) and grows in there:
        count = kept(found)
        if count is not None:
            # A longer one may need more graphs; those that both need must be the same.
            graphs = {name: there["graphs"].get(name, new) for name, new in asked["graphs"].items()}
            there = {**there, grows: asked[grows], "graphs": graphs}
    check_same(folder, there, asked)
    LongVideo(folder, found).check()
    if there is found.request:
        return found
    grown = wanted.model_copy(update={"segments": found.segments[:count]})
    write_journal(folder, grown)
    return grown


def tensor(frames: Frames) -> torch.Tensor:
    return torch.from_numpy(frames)
