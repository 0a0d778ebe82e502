"""The folder a bundle grows in: locked, journaled, resumable, and renamed when it is whole.

A new bundle grows in `<output>.building` beside its output folder (`NewBundle`): each finished
stage is journaled with the digests of its files, so that a killed build continues with `--resume`.
A resolution added to a bundle (`Addition`) takes seconds and has no journal: its files appear
whole in the bundle, and count from the moment the manifest, replaced last, names them.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict

from lcexport.builder.options import staging_folder
from lcexport.configs.errors import (
    InputError,
    IntegrityError,
    ResourceError,
    UsageError,
)
from lcexport.engines.files import resource_errors, sync_folder, write_bytes
from lcexport.engines.folders import FolderLock
from lcexport.engines.host import peak_rss_bytes, reset_peak_rss
from lcexport.engines.manifest import MANIFEST, FileRecord, Manifest, StageRecord, manifest_json

JOURNAL = ".journal.json"
COMPILING = "engines/*/*/.*"  # where a compiler wrote when its parent was killed


class StageOutput(BaseModel):
    """What a stage's work returns: its files, and facts for the stages after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, FileRecord]
    facts: dict[str, object] = {}
    child_peak_rss_bytes: int = 0  # of a process the stage ran its work in


class DoneStage(BaseModel):
    """One finished stage: what it cost and what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: StageRecord
    output: StageOutput


class Journal(BaseModel):
    """Which build this is, and what of it is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: dict[str, object]
    stages: dict[str, DoneStage] = {}


class Workplace(Protocol):
    """Where stages run. `folder` holds the weights and the graphs side by side."""

    folder: Path

    def run(self, name: str, work: Callable[[], StageOutput]) -> DoneStage: ...
    def publish(self, manifest: Manifest) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...


def measured(name: str, work: Callable[[], StageOutput]) -> DoneStage:
    """Run one stage and note its seconds and its own peak of resident memory."""
    reset_peak_rss()
    start = time.perf_counter()
    output = work()
    seconds = round(time.perf_counter() - start, 3)
    peak = max(peak_rss_bytes(), output.child_peak_rss_bytes)
    record = StageRecord(name=name, seconds=seconds, peak_rss_bytes=peak)
    return DoneStage(record=record, output=output)


class NewBundle:
    """A bundle in the making. Left by an error, it stays for `--resume` if a stage was done."""

    def __init__(self, output: Path, fingerprint: Mapping[str, object], *, resume: bool) -> None:
        self.output = output
        refuse_occupied(output)
        self.folder = staging_folder(output)
        self.journal = Journal(fingerprint=dict(fingerprint))
        self._resume = resume
        self._lock = FolderLock()

    def __enter__(self) -> Self:
        refuse_occupied(self.output)
        with resource_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        self._lock.take(self.folder, self.output)
        found = False
        try:
            refuse_occupied(self.output)  # again: the other builder may just have finished
            found = any(self.folder.iterdir())
            if found:
                self._continue()
            elif self._resume:
                raise InputError(f"nothing to resume: there is no unfinished {self.folder}")
            self._write_journal()
        except BaseException:
            self._leave(keep=found)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._leave(keep=kind is not None and bool(self.journal.stages))

    def run(self, name: str, work: Callable[[], StageOutput]) -> DoneStage:
        """Run one stage and journal it, unless the journal says it is done."""
        if name not in self.journal.stages:
            stages = {**self.journal.stages, name: measured(name, work)}
            self.journal = Journal(fingerprint=self.journal.fingerprint, stages=stages)
            self._write_journal()
        return self.journal.stages[name]

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and give the whole folder its name, in one rename."""
        with resource_errors(self.output):
            # Replace: a build killed between this and the rename resumes here.
            write_bytes(self.folder / MANIFEST, manifest_json(manifest), replace=True)
            self.folder.rename(self.output)  # over an empty folder, or none
            (self.output / JOURNAL).unlink()
            sync_folder(self.output.parent)

    def _continue(self) -> None:
        """Take over the journal of a killed build, and clear what its last stage left."""
        if not self._resume:
            raise ResourceError(
                f"an unfinished build is at {self.folder}",
                do="Continue it with --resume, or delete that folder.",
            )
        try:
            journal = Journal.model_validate(json.loads((self.folder / JOURNAL).read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.folder} has no readable journal", do="Delete it.") from error
        wanted, found = self.journal.fingerprint, journal.fingerprint
        if found != wanted:
            differ = [key for key, value in wanted.items() if found.get(key) != value]
            raise UsageError(
                f"the unfinished build at {self.folder} was started differently",
                got=f"another {', '.join(differ)}",
                do="Resume with the same options and checkpoint, or delete that folder.",
            )
        self.journal = journal
        sweep_compilers(self.folder)
        self._sweep()

    def _sweep(self) -> None:
        """Remove every file no finished stage made; check that those it made are there."""
        files = {
            name: record
            for done in self.journal.stages.values()
            for name, record in done.output.files.items()
        }
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in files and name != JOURNAL:
                path.unlink()
        for name, record in files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise InputError(f"{path} is not as journaled", do=f"Delete {self.folder}.")

    def _write_journal(self) -> None:
        data = self.journal.model_dump_json(indent=1).encode()
        write_bytes(self.folder / JOURNAL, data, replace=True)

    def _leave(self, *, keep: bool) -> None:
        if not keep and self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock.release()


class Addition:
    """A resolution in the making inside a finished bundle. Left by an error, it leaves no trace."""

    def __init__(self, output: Path) -> None:
        self.folder = output
        self._made: list[Path] = []
        self._lock = FolderLock()

    def __enter__(self) -> Self:
        if not (self.folder / MANIFEST).is_file():
            raise IntegrityError(f"--add needs a bundle, and {self.folder} is not a bundle")
        self._lock.take(self.folder, self.folder)
        sweep_compilers(self.folder)
        return self

    def claim(self, names: Iterable[str]) -> None:
        """Name the files and folders that will be made, none of which the bundle has.

        Only those are ever taken away again: nothing else that a user keeps in the bundle, and
        nothing that another addition put there. What a killed one left half-written goes now.
        """
        self._made = [self.folder / name for name in names]
        for path in self._made:
            for partial in path.parent.glob(f".{path.name}.*.partial"):
                partial.unlink()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            for path in self._made:
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
        self._lock.release()

    def run(self, name: str, work: Callable[[], StageOutput]) -> DoneStage:
        """Run one stage."""
        done = measured(name, work)
        made = [self.folder / file for file in done.output.files]
        strange = [path for path in made if not {path, path.parent} & set(self._made)]
        assert not strange, f"an addition made more than it said: {strange}"
        return done

    def publish(self, manifest: Manifest) -> None:
        """Replace the manifest: from here on the new resolution is part of the bundle."""
        with resource_errors(self.folder):
            write_bytes(self.folder / MANIFEST, manifest_json(manifest), replace=True)
        self._made.clear()


def sweep_compilers(folder: Path) -> None:
    """Remove the folders that killed builds compiled in. The bundle is locked: nobody is there."""
    for path in folder.glob(COMPILING):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def refuse_occupied(output: Path) -> None:
    """A new bundle needs a free name or an empty folder."""
    if output.name in ("", ".."):
        raise UsageError("the output needs a name of its own", got=repr(str(output)))
    if output.exists() and not output.is_dir():
        raise ResourceError("the output is a file", got=output, do="Name a folder with -o.")
    if output.exists() and any(output.iterdir()):
        raise ResourceError(
            "the output folder is not empty",
            got=output,
            do="Name another with -o, or use --add to add a resolution to a bundle.",
        )
