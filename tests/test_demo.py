"""The demo checkpoint: complete, sound, the same bytes every time."""

from pathlib import Path

import pytest

from lcexport.checkpoint import validate
from lcexport.configs.errors import ResourceError
from lcexport.demo import make_demo_checkpoint
from lcexport.engines.bundle import COMPONENTS


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_is_a_sound_checkpoint(demo_checkpoint):
    report = validate(demo_checkpoint)
    assert report.ok, report.problems
    assert (report.layout, report.naming) == ("released", "original")
    assert report.components_missing == []
    assert len(report.shards) == 2
    assert all((demo_checkpoint / name).is_dir() for name in COMPONENTS)


def test_it_is_the_same_every_time_and_leaves_nothing_else(demo_checkpoint, tmp_path):
    make_demo_checkpoint(tmp_path / "again")
    assert content(tmp_path / "again") == content(demo_checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_disk_that_is_too_small_is_one_error_and_leaves_nothing(mount_disk):
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match=r"No space left.*wanted about 25 MB"):
        make_demo_checkpoint(disk / "ck")
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_with_small_files_left(mount_disk):
    disk = mount_disk("size=20300k")  # the DiT's weights fit, the rest does not
    with pytest.raises(ResourceError):
        make_demo_checkpoint(disk / "ck")
    assert list(disk.iterdir()) == []


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(ResourceError, match="the name is too long"):
        make_demo_checkpoint(tmp_path / ("n" * 300))


def test_it_is_not_written_over_anything(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ResourceError, match="will not overwrite"):
        make_demo_checkpoint(tmp_path)
    assert content(tmp_path) == {"mine": b"precious"}
