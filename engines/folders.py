"""How folders come to be whole: locked while they grow, renamed when they are done."""

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lcexport.configs.errors import LockedError, ResourceError, UsageError
from lcexport.engines.files import already_there, resource_errors, sync_folder


def cache_folder(name: str) -> Path:
    """The user's folder for what can be made again: $XDG_CACHE_HOME or ~/.cache, lcexport/<name>.

    Raises:
        ResourceError: it cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcexport" / name
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class FolderLock:
    """An advisory lock on a folder, held by an open descriptor: it ends with the process."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path, output: Path) -> None:
        """Lock, or raise LockedError: somebody builds here, or just renamed the folder away."""
        held = LockedError(
            f"another build is writing {output}", do="Wait for it, or name another -o."
        )
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError as error:  # renamed or removed by its builder just now
            raise held from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            same = False
        if not same:
            os.close(descriptor)
            raise held
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends well, and else vanishes.

    What killed processes left of the same destination is removed first.

    Raises:
        UsageError: the destination has no name of its own.
        ResourceError: it is taken, its parent is missing or may not be written, the disk is full.
    """
    check_free(destination)
    sweep(destination)
    # a random name: a killed process of the same id must not be in the way
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    lock = FolderLock()
    with resource_errors(destination):
        temporary.mkdir()
        try:
            lock.take(temporary, destination)
            yield temporary
            for folder, _, _ in os.walk(temporary):
                sync_folder(Path(folder))
            check_free(destination)
            temporary.rename(destination)  # onto an empty folder too; onto a full one it fails
            sync_folder(destination.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            lock.release()


def check_free(destination: Path) -> None:
    """The destination is new or an empty folder, and its parent is there."""
    if destination.name in ("", ".."):
        raise UsageError("the output needs a name of its own", got=repr(str(destination)))
    with resource_errors(destination):
        if destination.is_dir() and not any(destination.iterdir()):
            return
        if destination.exists() or destination.is_symlink():
            raise already_there(destination)
    if not destination.parent.is_dir():
        raise ResourceError(
            f"the folder {destination.parent} does not exist", do="Create it first."
        )


def sweep(destination: Path) -> None:
    """Remove what killed processes left of `destination`; who is still at work holds a lock."""
    for path in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        if path.is_dir():
            lock = FolderLock()
            with suppress(LockedError):
                lock.take(path, destination)
                shutil.rmtree(path, ignore_errors=True)
                lock.release()
