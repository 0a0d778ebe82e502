"""How files come to be: temporary name, fsync, rename; over another only where asked.

A reader therefore sees a whole file under its final name, or none.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lcexport.configs.errors import LcexportError, ResourceError
from lcexport.engines.disk import CHUNK_BYTES, LargeFile, chunks_of, read_ahead


@contextmanager
def new_file(path: Path, *, replace: bool = False, large: bool = False) -> Iterator[BinaryIO]:
    """Open `path` for writing; it appears, complete and synced, when the block ends well.

    A `large` one is written past the system's cache, and has to be written front to back.

    Raises:
        ResourceError: the file exists (unless `replace`), the disk is full, or no permission.
    """
    if path.exists() and not replace:
        raise already_there(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with resource_errors(path):
        try:
            with LargeFile(temporary) if large else temporary.open("wb") as file:
                yield cast(BinaryIO, file)  # the stubs derive files from two families
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                publish(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def refuse_existing(*paths: Path) -> None:
    """Refuse early what `new_file` would refuse after an hour's work."""
    for path in paths:
        if path.exists():
            raise already_there(path)
        if not path.parent.is_dir():
            raise ResourceError("no such folder", got=path.parent, do="Create it first.")


def publish(temporary: Path, path: Path) -> None:
    """Rename without overwriting: link fails where the name is taken, rename would not.

    Where there are no hard links it is a plain rename.
    """
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise already_there(path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        temporary.rename(path)


def write_bytes(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a small file as `new_file` does."""
    with new_file(path, replace=replace) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, in bounded memory; of a large one, threads read ahead."""
    if path.stat().st_size <= CHUNK_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for data in read_ahead(chunks_of(path)):
        digest.update(data)
    return digest.hexdigest()


def already_there(path: Path) -> LcexportError:
    return ResourceError(
        "will not overwrite",
        got=f"an existing {path}",
        do="Name another path, or move it away first.",
    )


@contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Turn the system's 'disk full' and 'no permission' into a ResourceError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: writing {path}", do="Free some space or choose another disk."
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise ResourceError(
                f"no permission to write {path}", do="Choose a folder you may write to."
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise ResourceError("the name is too long", got=path, do="Choose another.") from error
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise ResourceError(
                f"cannot make {path}: a file is in the way", do="Choose another folder."
            ) from error
        raise


def identity(path: Path) -> tuple[int, int, int] | None:
    """Which file this is now; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
