"""A change that is killed at any step is finished or undone by the next command."""

import subprocess
import sys
from pathlib import Path

import pytest
from lora_files import LORA_A, LORA_B, digests

from lcexport.configs.errors import IntegrityError, ResourceError
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import UNFINISHED, WEIGHTS
from lcexport.lora import LoraChoice, bake, remove
from lcexport.lora import change as changing

A = LoraChoice(path=LORA_A)
B = LoraChoice(path=LORA_B)
KILLER = Path(__file__).with_name("kill_double.py")


def killed_copies(bundle: Path, place: Path, what: str) -> list[Path]:
    """Copies of the bundle, each killed one step later; the last one was not."""
    place.mkdir()
    command = [sys.executable, KILLER, bundle, place, what, LORA_A]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(place.iterdir(), key=lambda folder: int(folder.name))


def is_sound(folder: Path, states: list[dict[str, str]]) -> bool:
    """Whether the bundle opens; then it is one of these states, but for files it does not name."""
    if (folder / UNFINISHED).exists():
        with pytest.raises(IntegrityError, match="being exchanged"):
            open_bundle(folder)
        return False
    named = open_bundle(folder, every_hash=True).manifest.files
    found = digests(folder)
    named = {"manifest.json", *named}
    assert {name: found[name] for name in named} in states
    return True


@pytest.mark.parametrize("what", ["bake", "remove"])
def test_a_change_killed_at_each_step(bundle, tmp_path, what):
    base = digests(bundle)
    bake(bundle, [A], golden=False)
    baked = digests(bundle)
    if what == "bake":
        remove(bundle)
        assert digests(bundle) == base
    copies = killed_copies(bundle, tmp_path / "copies", what)
    wanted = baked if what == "bake" else base
    assert digests(copies[-1]) == wanted
    assert len(copies) > 8
    sound = [is_sound(folder, [base, baked]) for folder in copies]
    assert sound[0]
    assert sound[-1]
    assert not all(sound)
    for number, folder in enumerate(copies):
        if what == "bake":
            bake(folder, [A], golden=False)
        elif not sound[number] or open_bundle(folder).manifest.baked:
            remove(folder)
        assert digests(folder) == wanted, number
        if what == "bake" and number % 3 == 0:
            remove(folder)
            assert digests(folder) == base, number


def test_an_unfinished_bundle_is_opened_by_nobody(bundle):
    (bundle / UNFINISHED).mkdir(parents=True)
    with pytest.raises(IntegrityError, match=r"being exchanged.*lora bake.*again"):
        open_bundle(bundle)
    bake(bundle, [B], golden=False)
    assert open_bundle(bundle).manifest.baked


def test_a_write_that_fails_leaves_the_base(bundle, monkeypatch):
    before = digests(bundle)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lcexport.lora.baking.write_manifest", full)
        with pytest.raises(ResourceError, match="disk is full"):
            bake(bundle, [A], golden=False)
    assert digests(bundle) == before
    assert not (bundle / "lora").exists()


def test_a_disk_that_is_too_small_is_said_before(bundle, monkeypatch):
    before = digests(bundle)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match="disk is too small"):
        bake(bundle, [A], golden=False)
    assert digests(bundle) == before


def test_where_there_are_no_hard_links_the_base_is_copied(bundle, monkeypatch):
    before = digests(bundle)

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(changing.os, "link", no_links)
    bake(bundle, [B], golden=False)
    assert digests(bundle)["lora/base/" + WEIGHTS] == before[WEIGHTS]
    remove(bundle)
    assert digests(bundle) == before
