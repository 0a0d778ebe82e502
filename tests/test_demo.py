"""The demo checkpoint: complete, sound, the same bytes every time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lcexport.builder import BuildOptions
from lcexport.checkpoint import validate
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import LockedError, ResourceError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.demo import CONFIG, SIBLINGS, TOY, Sibling, make_demo_checkpoint, toy_bundle
from lcexport.engines.manifest import COMPONENTS
from lcexport.runtime import Video
from lcexport.runtime.media import read_video


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


def test_its_sibling_has_a_dit_and_a_vae_of_its_own(tmp_path, monkeypatch):
    narrow = CONFIG.model_copy(update={"hidden_size": 128, "depth": 2})
    monkeypatch.setitem(SIBLINGS, "bench", Sibling(narrow, vae_channels=4, megabytes=5))
    make_demo_checkpoint(tmp_path / "bench", "bench")
    report = validate(tmp_path / "bench")
    assert report.ok, report.problems
    written = DiTConfig.from_json(tmp_path / "bench/dit/config.json")
    assert (written.hidden_size, written.depth) == (128, 2)
    assert json.loads((tmp_path / "bench/vae/config.json").read_text())["base_dim"] == 4


def test_the_toy_is_copied_whole_and_sound(tmp_path):
    make_demo_checkpoint(tmp_path / "toy", "toy")
    assert content(tmp_path / "toy") == content(TOY)
    report = validate(tmp_path / "toy")
    assert report.ok, report.problems
    assert report.components_missing == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def demo(run, cache, tmp_path, monkeypatch) -> Callable[..., Path]:
    """`demo(*more)` is the video of a step of `generate --demo`, whose bundle is made once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    out = tmp_path / "demo.mp4"

    def generate(*more: object) -> Path:
        out.unlink(missing_ok=True)
        prompt = "a red circle moves left"
        code, _, err = run("generate", "--demo", prompt, "--steps", 1, "--out", out, *more)
        assert (code, out.is_file()) == (0, True), err
        return out

    return generate


def test_the_demo_makes_the_toys_bundle_once(demo, cache):
    demo()
    (bundle,) = (cache / "lcexport" / "toy").iterdir()
    made = (bundle / "manifest.json").stat().st_mtime_ns
    demo()
    assert (bundle / "manifest.json").stat().st_mtime_ns == made


def test_the_demo_starts_from_a_picture_of_any_shape(demo, tmp_path):
    Image.new("RGB", (96, 48), "red").save(tmp_path / "picture.png")
    frames, _ = read_video(demo("--image", tmp_path / "picture.png"))
    assert frames.shape == (17, 64, 64, 3)


def test_the_demo_goes_on_from_a_video(demo, tmp_path):
    given = Video(torch.rand(9, 64, 64, 3), fps=15, timings={}, seed=0)
    given.save(tmp_path / "given.mp4")
    frames, _ = read_video(demo("--video", tmp_path / "given.mp4"))
    assert frames.shape == (9 + 17 - 5, 64, 64, 3)


def test_the_demos_bundle_is_another_for_another_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lcexport.builder.build", lambda options: None)
    one, again = toy_bundle(), toy_bundle()
    changed = preset_from("toy").model_copy(update={"text_tokens": 25})
    monkeypatch.setattr("lcexport.demo.preset_from", lambda name: changed)
    assert one == again != toy_bundle()


def test_a_second_demo_is_told_of_the_first(tmp_path, monkeypatch):
    def build(options: BuildOptions) -> None:
        raise LockedError("another build is writing it", do="Wait for it, or name another -o.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lcexport.builder.build", build)
    with pytest.raises(LockedError, match=r"another process is making the demo's .*Try again") as e:
        toy_bundle()
    assert "another -o" not in str(e.value)


@pytest.mark.parametrize(
    "words",
    [
        ("--demo", "a", "--prompt", "b"),
        ("bundle", "--demo", "a"),
        ("bundle",),
        ("--prompt", "a"),
        (),
    ],
    ids=" ".join,
)
def test_generate_wants_a_bundle_and_a_prompt_or_the_demo_alone(run, tmp_path, words):
    code, _, err = run("generate", *words, "--out", tmp_path / "x.mp4")
    assert code == 2
    assert "what is to be shown, and by what, is not said once" in err
    assert "--demo" in err


def test_there_are_three_sizes(tmp_path):
    with pytest.raises(
        UsageError, match="no such size of checkpoint; got 'huge'; wanted toy or demo or bench"
    ):
        make_demo_checkpoint(tmp_path / "huge", "huge")
    assert list(tmp_path.iterdir()) == []


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
