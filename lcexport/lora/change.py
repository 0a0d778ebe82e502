"""How files of a finished bundle change together or not at all.

The new files are prepared in a folder that becomes `lora/next` in one rename. From then on the
change is decided: `finish` moves each file to its place, the manifest last, and may be interrupted
and repeated at any point. As long as `lora/next` is there no reader opens the bundle.
Files are replaced by others and never written into: who has the old ones open keeps them.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lcexport.configs.errors import IntegrityError
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.files import resource_errors, sync_folder
from lcexport.engines.folders import FolderLock, new_folder, sweep
from lcexport.engines.manifest import LORA_BASE, MANIFEST, UNFINISHED, parse_manifest

NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


@contextmanager
def locked_bundle(folder: Path) -> Iterator[tuple[Bundle, bool]]:
    """The bundle, under its lock; and whether a change that was left unfinished was finished now.

    Raises:
        IntegrityError: no bundle, or a damaged one.
        LockedError: a build or another change is at work on it.
    """
    if not (folder / MANIFEST).is_file():
        raise IntegrityError("not a bundle", got=f"no {folder / MANIFEST}")
    lock = FolderLock()
    lock.take(folder, folder)
    try:
        finished = finish(folder)
        sweep(folder / UNFINISHED)
        yield open_bundle(folder), finished
    finally:
        tidy(folder)
        lock.release()


@contextmanager
def changed_files(folder: Path) -> Iterator[Path]:
    """A folder to put new files in, at the paths they will have in the bundle, and a manifest.

    When the block ends well the bundle has them; when it does not, nothing has changed.
    """
    with resource_errors(folder):
        (folder / UNFINISHED).parent.mkdir(exist_ok=True)
    with new_folder(folder / UNFINISHED) as staged:
        yield staged
    finish(folder)


def finish(folder: Path) -> bool:
    """Complete a decided change; whether there was one.

    Moves what is left in `lora/next`, then removes what only the old manifest names.
    """
    pending = folder / UNFINISHED
    if not pending.is_dir():
        return False
    with resource_errors(folder):
        if (pending / MANIFEST).is_file():
            old, new = parse_manifest(folder / MANIFEST), parse_manifest(pending / MANIFEST)
            for name in new.files:
                if (pending / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (pending / name).replace(folder / name)
            for name in old.files.keys() - new.files.keys():
                (folder / name).unlink(missing_ok=True)
            touched = (folder / name for name in (*old.files, *new.files))
            for place in {path.parent for path in touched if path.parent.is_dir()}:
                sync_folder(place)
            (pending / MANIFEST).replace(folder / MANIFEST)
            sync_folder(folder)
        shutil.rmtree(pending)
    return True


def tidy(folder: Path) -> None:
    """Remove the folders that a change left empty."""
    for name in (f"{LORA_BASE}/golden", LORA_BASE, "lora"):
        with suppress(OSError):  # not empty, or not there
            (folder / name).rmdir()


def keep_same(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where there are no hard links."""
    with resource_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            shutil.copyfile(source, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())
