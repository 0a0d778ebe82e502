"""Bytes past the system's cache are the same bytes, at any place and of any size."""

import errno
import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from lcexport.configs.errors import ResourceError
from lcexport.engines import disk
from lcexport.engines.disk import PAGE_BYTES, ByteRange, LargeFile, chunks_of, read_ahead
from lcexport.engines.files import new_file, sha256_of, write_bytes


@pytest.fixture(params=["past the cache", "through it", "no other way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files as the file system has them, small ones, and a file system that refuses."""
    monkeypatch.setattr(disk, "CHUNK_BYTES", 5 * PAGE_BYTES)
    monkeypatch.setattr(disk, "LARGE_BYTES", 1 << 40 if request.param == "through it" else 0)
    real = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return real(path, flags, *more)

    if request.param == "no other way":
        monkeypatch.setattr(os, "open", refusing)


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(23 * PAGE_BYTES + 100)


@pytest.mark.usefixtures("way")
def test_ranges_come_as_they_are_in_the_files(tmp_path: Path, content: bytes):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        write_bytes(path, content)
    size = len(content)
    places = [(0, 1), (4095, 4097), (4096, 8192), (5, 5), (1, size), (size - 3, size), (0, size)]
    ranges = [ByteRange(path, *place) for path in paths for place in places]
    found = [bytes(data) for data in read_ahead(ranges)]
    assert found == [content[wanted.start : wanted.end] for wanted in ranges]


@pytest.mark.usefixtures("way")
def test_what_is_beyond_the_end_is_missing(tmp_path: Path, content: bytes):
    path, size = tmp_path / "file", len(content)
    write_bytes(path, content)
    ranges = [ByteRange(path, size - 5, size + 9000), ByteRange(path, size + 1, size + 2)]
    assert [bytes(data) for data in read_ahead(ranges)] == [content[-5:], b""]


@pytest.mark.usefixtures("way")
def test_a_whole_file_comes_in_chunks(tmp_path: Path, content: bytes):
    path = tmp_path / "file"
    write_bytes(path, content)
    assert b"".join(map(bytes, read_ahead(chunks_of(path)))) == content


def test_two_ranges_are_read_at_a_time(tmp_path: Path, content: bytes, monkeypatch):
    """The disk has the next request while one is being answered."""
    path = tmp_path / "file"
    write_bytes(path, content)
    real, both = os.preadv, threading.Barrier(2, timeout=20)

    def waiting_for_another(*given):
        both.wait()
        return real(*given)

    monkeypatch.setattr(os, "preadv", waiting_for_another)
    ranges = [ByteRange(path, start, start + 10) for start in range(0, 60, 10)]
    assert b"".join(map(bytes, read_ahead(ranges))) == content[:60]


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        list(read_ahead([ByteRange(tmp_path / "none", 0, 1)]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("step", [1000, PAGE_BYTES, 1 << 20])
def test_a_large_file_is_what_was_written(tmp_path: Path, content: bytes, step: int):
    path = tmp_path / "file"
    with new_file(path, large=True) as file:
        for start in range(0, len(content), step):
            data = content[start : start + step]
            assert file.write(data) == len(data)
        assert file.tell() == len(content)
        assert not path.exists()
    assert path.read_bytes() == content


def test_an_abandoned_large_file_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), new_file(tmp_path / "file", large=True) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_on_a_full_disk_is_an_error(mount_disk):
    folder = mount_disk("size=1m")
    with (
        pytest.raises(ResourceError, match="the disk is full"),
        new_file(folder / "file", large=True) as file,
    ):
        file.write(bytes(disk.CHUNK_BYTES))
    assert list(folder.iterdir()) == []


def test_other_refusals_are_not_taken_for_a_missing_way(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        LargeFile(tmp_path)


@pytest.mark.usefixtures("way")
def test_digests_are_the_same_either_way(tmp_path: Path, content: bytes):
    path, small = tmp_path / "file", tmp_path / "small"
    many = content * 100  # more than `sha256_of` reads at once
    write_bytes(path, many)
    write_bytes(small, many[: disk.CHUNK_BYTES])
    assert sha256_of(path) == hashlib.sha256(many).hexdigest()
    assert sha256_of(small) == hashlib.sha256(many[: disk.CHUNK_BYTES]).hexdigest()
