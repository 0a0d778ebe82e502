"""What the kernel says of memory, where a container has less than the machine."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lcexport.engines import host
from lcexport.engines.host import available_memory_bytes, total_memory_bytes

MACHINE = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n"
TOTAL, FREE = 1000 * 1024, 800 * 1024
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine("0::/a", {"a/memory.max": 5, ...})`: a machine of 1000 kB, and control groups."""

    def make(groups: str | None, files: dict[str, object]) -> None:
        for name in ("MEMINFO", "CGROUP", "CGROUPS"):
            monkeypatch.setattr(host, name, tmp_path / name)
        (tmp_path / "MEMINFO").write_text(MACHINE)
        if groups is not None:
            (tmp_path / "CGROUP").write_text(groups + "\n")
        for name, content in files.items():
            path = tmp_path / "CGROUPS" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))

    return make


def v2(folder: str, limit: object, used: int, stat: str = "") -> dict[str, object]:
    """A group's three files in version 2."""
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": used,
        f"{folder}memory.stat": f"anon 1\n{stat}",
    }


def v1(folder: str, limit: object, used: int, stat: str = "") -> dict[str, object]:
    """A group's three files in version 1."""
    return {
        f"memory/{folder}memory.limit_in_bytes": limit,
        f"memory/{folder}memory.usage_in_bytes": used,
        f"memory/{folder}memory.stat": f"cache 1\n{stat}",
    }


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (None, {}),
        ("0::/", {}),
        ("0::/a", v2("a/", "max", 10)),
        ("0::/a", v2("a/", 2 * TOTAL, 10)),
        ("4:memory:/", v1("", V1_UNLIMITED, 10)),
        ("3:cpu:/a", v1("a/", 50_000, 10)),
    ],
)
def test_without_a_limit_below_the_machines_the_machine_counts(machine, groups, files):
    machine(groups, files)
    assert (total_memory_bytes(), available_memory_bytes()) == (TOTAL, FREE)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b", v2("a/b/", 50_000, 20_000)),
        ("0::/", v2("", 50_000, 20_000)),
        ("4:memory:/a\n0::/", v1("a/", 50_000, 20_000)),
        ("4:cpu,memory:/host/pod", v1("", 50_000, 20_000)),
        ("0::/../pod", v2("", 50_000, 20_000)),
    ],
)
def test_a_limit_is_what_there_is(machine, groups, files):
    machine(groups, files)
    assert (total_memory_bytes(), available_memory_bytes()) == (50_000, 30_000)


def test_the_narrowest_group_above_counts(machine):
    machine("0::/a/b", {**v2("a/b/", 90_000, 0), **v2("a/", 70_000, 60_000)})
    assert (total_memory_bytes(), available_memory_bytes()) == (70_000, 10_000)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a", v2("a/", 50_000, 45_000, "active_file 4000\ninactive_file 20000")),
        ("4:memory:/", v1("", 50_000, 45_000, "total_active_file 4000\ntotal_inactive_file 20000")),
    ],
)
def test_files_that_the_kernel_can_drop_are_not_in_use(machine, groups, files):
    machine(groups, files)
    assert available_memory_bytes() == 29_000


def test_more_in_use_than_allowed_is_none_left(machine):
    machine("0::/a", v2("a/", 50_000, 60_000))
    assert available_memory_bytes() == 0


def test_this_machine():
    assert 0 < available_memory_bytes() <= total_memory_bytes()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_freed_memory_is_kept_when_asked_and_given_back_on_release():
    freed, kept, released = json.loads(
        subprocess.check_output([sys.executable, "-c", KEPT], text=True)
    )
    assert freed < SIZE / 4
    assert kept > SIZE * 3 / 4
    assert released < SIZE / 4


SIZE = 256 << 20
KEPT = f"""
import json
from lcexport.engines.host import keep_freed_memory, release, resident_bytes
import torch

def left():
    before = resident_bytes()
    torch.ones({SIZE // 4})
    return resident_bytes() - before

torch.ones(1)
freed, before = left(), resident_bytes()
assert keep_freed_memory()
kept = left()
release()
print(json.dumps([freed, kept, resident_bytes() - before]))
"""
