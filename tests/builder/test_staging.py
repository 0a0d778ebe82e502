"""A build that is killed, resumed, raced: the finished bundle is the same, byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lcexport.builder import BuildOptions, build
from lcexport.builder.staging import JOURNAL
from lcexport.configs.errors import InputError, LockedError, ResourceError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import MANIFEST, read_manifest

SIZE = "64x96x9"

# Imports once, then forks a builder for each point, which kills itself there.
KILLED_BUILDS = """
import json, os, signal, sys
from lcexport.builder import BuildOptions, build

options = BuildOptions.model_validate_json(sys.argv[1])
for stage, moment in json.loads(sys.argv[2]):
    def kill(name, done, total):
        at = "start" if done == 0 else "end" if total == 1 else "middle"
        if (name, at) == (stage, moment) and (at != "middle" or done > total // 2):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            build(options, kill)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    folder = options.output.with_name(options.output.name + ".building")
    print(json.dumps({
        "at": [stage, moment],
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "output": options.output.exists(),
        "done": list(json.loads((folder / ".journal.json").read_text())["stages"]),
        "partial": len(list(folder.rglob("*.partial"))),
    }))
    options = options.model_copy(update={"resume": True})
"""
STAGES = ["weights", "components", f"graph:{SIZE}", f"golden:{SIZE}", f"engine:onnxruntime:{SIZE}"]


class Stop(Exception):
    """Raised by a progress callback."""


def stop_at(stage: str):
    def report(name: str, done: int, total: int) -> None:
        if name == stage:
            raise Stop

    return report


@pytest.fixture
def options(demo_options: BuildOptions, tmp_path: Path) -> BuildOptions:
    (tmp_path / "place").mkdir()
    return demo_options.model_copy(update={"output": tmp_path / "place" / "out"})


@pytest.fixture
def building(options: BuildOptions) -> Path:
    """The folder of a build that was stopped after its weights."""
    with pytest.raises(Stop):
        build(options, stop_at("components"))
    folder = options.output.with_name("out.building")
    assert folder.is_dir()
    return folder


def adding(options: BuildOptions, folder: Path) -> BuildOptions:
    presets = (preset_from("64x64x5"),)
    return options.model_copy(update={"output": folder, "add": True, "presets": presets})


def half_compiled(folder: Path) -> Path:
    """What the compiler's parent leaves in a bundle when it is killed."""
    left = folder / "engines/tensorrt-rtx/96x64x9/.00.plan.k3_x9abc"
    left.mkdir(parents=True)
    (left / "plan").write_bytes(b"half")
    return left


def resumed(options: BuildOptions, **changes: object) -> BuildOptions:
    return options.model_copy(update={"resume": True, **changes})


def test_killed_at_every_stage_and_resumed_it_is_the_same_bundle(options, demo_bundle):
    points = [["weights", "start"], ["weights", "middle"]]
    points += [[stage, "end"] for stage in STAGES]
    command = [sys.executable, "-c", KILLED_BUILDS, options.model_dump_json(), json.dumps(points)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["at"] for report in reports] == points, done.stderr
    assert all(report["killed"] and not report["output"] for report in reports)
    assert [report["done"] for report in reports] == [
        [], [], *(STAGES[: count + 1] for count in range(len(STAGES)))
    ]  # fmt: skip
    assert [report["partial"] for report in reports] == [0, 1, 0, 0, 0, 0, 0]

    bundle = build(resumed(options))
    assert [path.name for path in options.output.parent.iterdir()] == ["out"]
    once = read_manifest(demo_bundle)
    assert bundle.manifest.files == once.files
    assert bundle.manifest.graphs == once.graphs
    open_bundle(bundle.folder, every_hash=True)
    present = {
        p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*") if p.is_file()
    }
    assert present == {MANIFEST, *once.files}


def test_an_unfinished_build_is_not_taken_over_unasked(options, building):
    with pytest.raises(ResourceError, match=r"unfinished build is at .*--resume") as caught:
        build(options)
    assert str(building) in str(caught.value)
    assert (building / JOURNAL).exists()


def test_an_unfinished_build_is_resumed_with_its_own_options_only(options, building):
    other = resumed(options, precision="bf16", backends=("eager",))
    with pytest.raises(UsageError, match="got another precision, backends"):
        build(other)
    assert (building / JOURNAL).exists()


def test_an_unfinished_build_is_resumed_with_its_own_checkpoint_only(
    options, building, demo_checkpoint, tmp_path
):
    other = shutil.copytree(demo_checkpoint, tmp_path / "other")
    for shard in (other / "dit").glob("*-00001-*"):
        os.utime(shard)
    with pytest.raises(UsageError, match="got another model, source"):
        build(resumed(options, model=other))
    assert (building / JOURNAL).exists()


@pytest.mark.parametrize("text", ["", "{", "{}", "[" * 100_000])
def test_a_damaged_journal(options, building, text):
    (building / JOURNAL).write_text(text)
    with pytest.raises(InputError, match="no readable journal"):
        build(resumed(options))


def test_a_journaled_file_that_changed(options, building):
    with (building / "dit.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"dit\.safetensors is not as journaled"):
        build(resumed(options))


def test_what_no_finished_stage_made_is_swept_away(options, building):
    (building / "vae").mkdir()
    (building / "vae" / "half").write_bytes(b"half")
    (building / ".dit.safetensors.1.partial").write_bytes(b"half")
    compiling = half_compiled(building)
    with pytest.raises(Stop):
        build(resumed(options), stop_at("components"))
    assert not list(building.rglob("half"))
    assert not list(building.rglob("*.partial"))
    assert not compiling.exists()


def test_nothing_to_resume(options):
    with pytest.raises(InputError, match="nothing to resume"):
        build(resumed(options))
    assert list(options.output.parent.iterdir()) == []


def test_a_build_stopped_in_its_first_stage_leaves_nothing(options):
    with pytest.raises(Stop):
        build(options, stop_at("weights"))
    assert list(options.output.parent.iterdir()) == []


def test_two_builders_of_one_folder(options):
    refused = []

    def build_too(stage: str, done: int, total: int) -> None:
        for second in (options, resumed(options)):
            with pytest.raises(LockedError, match="another build is writing") as caught:
                build(second)
            refused.append(caught.value.exit_code)
        raise Stop

    with pytest.raises(Stop):
        build(options, build_too)
    assert refused == [9, 9]
    assert list(options.output.parent.iterdir()) == []


def test_what_a_killed_addition_compiled_in_is_gone_after_the_next(options, demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    compiling = half_compiled(folder)
    finished = compiling.with_name("00.plan")
    finished.write_bytes(b"mine")
    with pytest.raises(Stop):
        build(adding(options, folder), stop_at("graph:64x64x5"))
    assert not compiling.exists()
    assert finished.read_bytes() == b"mine"


def test_two_builders_adding_to_one_bundle(options, demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    before = sorted(folder.rglob("*"))

    def build_too(stage: str, done: int, total: int) -> None:
        with pytest.raises(LockedError):
            build(adding(options, folder))
        raise Stop

    with pytest.raises(Stop):
        build(adding(options, folder), build_too)
    assert sorted(folder.rglob("*")) == before
