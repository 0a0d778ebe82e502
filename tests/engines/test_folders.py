"""A folder appears whole or not at all, and leaves nothing beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lcexport.configs.errors import ResourceError, UsageError
from lcexport.engines.folders import new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from lcexport.engines.folders import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_an_error_leaves_nothing(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_a_running_ones_is_not(tmp_path):
    code = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    subprocess.run(code, capture_output=True, check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "half").exists()
    with new_folder(tmp_path / "other") as other:
        assert left.exists()  # another destination's
        with new_folder(tmp_path / "out"), new_folder(tmp_path / "other2"):
            assert not left.exists()
            assert other.exists()
        assert [path.name for path in (tmp_path / "out").parent.glob(".out.*")] == []


def test_two_at_once_do_not_sweep_each_other_and_the_later_one_is_refused(tmp_path):
    def race() -> None:
        with new_folder(tmp_path / "out") as later:
            with new_folder(tmp_path / "out") as first:
                (first / "file").write_text("first")
                assert later.is_dir()
            (later / "file").write_text("later")

    with pytest.raises(ResourceError, match="will not overwrite"):
        race()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(ResourceError, match="name is too long"), new_folder(tmp_path / ("n" * 300)):
        pass


def test_no_name_at_all():
    with pytest.raises(UsageError, match="a name of its own"), new_folder(Path("/")):
        pass
