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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from lcexport.configs.errors import IncompatibleError, IntegrityError, LockedError, UsageError
from lcexport.engines.bundle import COMPONENTS, WEIGHTS, Bundle, FileRecord, GraphRecord, check_file
from lcexport.engines.files import new_file, resource_errors, sha256_of, write_bytes
from lcexport.engines.folders import FolderLock
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.media import Pixels, truncated_uint8
from lcexport.runtime.video import Video, check_target, write_mp4

SCHEMA_VERSION = 1
JOURNAL = "journal.json"
Frames = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
OnSegment = Callable[[int, int], object]  # finished, wanted


class Segment(BaseModel):
    """One finished segment: its file, and which of the file's frames the video shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^\d{3,}\.safetensors$")
    record: FileRecord
    skipped: int = Field(ge=0)  # at the file's beginning: they are the segment before
    frames: int = Field(ge=1)  # shown, after those


class Journal(BaseModel):
    """What a folder's segments are. `request` is all that decides their frames."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    fps: float = Field(gt=0)
    height: int
    width: int
    request: dict[str, Any]
    segments: tuple[Segment, ...] = ()


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
def open_segments(folder: Path, wanted: Journal) -> Iterator[SegmentFolder]:
    """A folder for this journal's request: new, empty, or with the request's first segments in it.

    It is locked until the block ends, or the process does.

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
        yield SegmentFolder(folder, continued(folder, wanted))
    finally:
        lock.release()


def continued(folder: Path, wanted: Journal) -> Journal:
    """The folder's journal where it is of the same request, a new one in an empty folder."""
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
    check_same(folder, found.request, json.loads(wanted.model_dump_json())["request"])
    LongVideo(folder, found).check()
    return found


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UsageError that names what differs between two requests."""
    names = sorted(found.keys() | wanted.keys())
    other = [name for name in names if found.get(name) != wanted.get(name)]
    if other:
        shown = other[0]
        raise UsageError(
            f"{folder} holds another request's segments: {', '.join(other)} differ",
            got=f"{shown} {brief(wanted.get(shown))}", wanted=f"{brief(found.get(shown))} as there",
            do="Ask for the same to continue, or name another folder.",
        )  # fmt: skip


def brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_journal(folder: Path, journal: Journal) -> None:
    text = journal.model_dump_json(indent=1) + "\n"
    write_bytes(folder / JOURNAL, text.encode(), replace=True)


def read_journal(path: Path) -> Journal:
    """Parse `journal.json`. Raises IntegrityError, IncompatibleError: see `open_segments`."""
    do = "Move the folder away and start again."
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", do=do) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise IncompatibleError(
            f"{path} has another schema version", got=version, wanted=SCHEMA_VERSION, do=do
        )
    try:
        return Journal.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: {where}: {first['msg']}", do=do) from error


def tensor(frames: Frames) -> torch.Tensor:
    return torch.from_numpy(frames)
