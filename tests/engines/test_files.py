"""Files appear whole or not at all, never over another, and the system's refusals are explained."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from lcexport.configs.errors import ResourceError
from lcexport.engines.files import new_file, resource_errors, sha256_of, write_bytes


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with new_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" whole")
    assert content(tmp_path) == {"file": b"half whole"}


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert content(tmp_path) == {}


def test_an_existing_file_is_not_overwritten(tmp_path):
    write_bytes(tmp_path / "file", b"first")
    with pytest.raises(
        ResourceError, match=r"will not overwrite; got an existing .*file"
    ) as caught:
        write_bytes(tmp_path / "file", b"second")
    assert caught.value.exit_code == 4
    assert content(tmp_path) == {"file": b"first"}


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ResourceError, match="will not overwrite"), new_file(path) as file:  # noqa: PT012
        file.write(b"mine")
        path.write_bytes(b"theirs")
    assert content(tmp_path) == {"file": b"theirs"}


def test_replacing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"first")
    with pytest.raises(RuntimeError), new_file(path, replace=True) as file:  # noqa: PT012
        file.write(b"sec")
        raise RuntimeError
    assert content(tmp_path) == {"file": b"first"}
    with new_file(path, replace=True) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert content(tmp_path) == {"file": b"second"}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_bytes(tmp_path / "file", b"content")
    assert content(tmp_path) == {"file": b"content"}


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.ENOSPC, "the disk is full: writing .*place"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission to write .*place"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOTDIR, "cannot make place: a file is in the way"),
    ],
)
def test_the_systems_refusals_are_explained(number, match):
    with pytest.raises(ResourceError, match=match) as caught, resource_errors(Path("place")):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 4
    assert caught.value.do
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass_unchanged():
    with pytest.raises(OSError, match="worn out"), resource_errors(Path("place")):
        raise OSError(errno.EIO, "worn out")


def test_a_full_disk_leaves_nothing(mount_disk):
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match="the disk is full"):
        write_bytes(disk / "file", bytes(2 << 20))
    assert content(disk) == {}


def test_digests_are_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1000)
    known = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert sha256_of(path) == known.stdout.split()[0]
