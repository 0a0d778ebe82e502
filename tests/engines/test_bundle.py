"""Opening a bundle: what the manifest says is what is there, or an error that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines import bundle as bundles
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest

SIZE = "64x96x9"
GRAPH = f"dit.{SIZE}.onnx"


@pytest.fixture
def folder(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle, to be damaged."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle")


@pytest.fixture
def edit(folder: Path) -> Callable[[Callable[[dict], object]], None]:
    """`edit(change)` rewrites the manifest after `change(manifest)`."""

    def apply(change: Callable[[dict], object]) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))

    return apply


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_bundle_opens_and_finds_its_files(demo_bundle):
    bundle = open_bundle(demo_bundle, every_hash=True)
    assert bundle.path(WEIGHTS) == demo_bundle / WEIGHTS
    assert bundle.graph(SIZE).file == GRAPH
    with pytest.raises(IntegrityError, match="has no file nothing"):
        bundle.path("nothing")
    with pytest.raises(UsageError, match="lcexport build --res 480p --add -o") as caught:
        bundle.graph("480p")
    assert SIZE in str(caught.value)


def test_a_manifest_survives_the_round_trip(demo_bundle):
    manifest = read_manifest(demo_bundle)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_folder_without_a_manifest(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(IntegrityError, match="not a bundle"):
            open_bundle(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version(folder, edit, version):
    edit(lambda data: data.update(schema_version=version, unknown_to_this_version=1))
    with pytest.raises(IncompatibleError, match="another schema version") as caught:
        open_bundle(folder)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[" * 100_000])
def test_a_manifest_that_is_not_json(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not JSON"):
        open_bundle(folder)


def test_a_manifest_that_is_another_kind_of_json(folder):
    (folder / MANIFEST).write_text("[1]")
    with pytest.raises(IncompatibleError, match="another schema version"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("files"), "files: Field required"),
        (lambda d: d.update(surprise=1), "surprise: Extra inputs"),
        (lambda d: d["files"][GRAPH].update(sha256="abc"), r"files\.dit\.64x96x9\.onnx\.sha256"),
        (lambda d: d["files"][GRAPH].update(bytes=-1), r"bytes: Input should be greater"),
        (lambda d: d.update(precision="fp64"), "precision: "),
        (lambda d: d["graphs"][SIZE].update(batch=0), "batch: "),
        (lambda d: d["graphs"][SIZE]["job"]["preset"].update(height=65), "height: "),
    ],
)
def test_a_damaged_manifest_names_the_field(folder, edit, change, match):
    edit(change)
    with pytest.raises(IntegrityError, match=match) as caught:
        open_bundle(folder)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("name", [GRAPH, "vae/config.json", f"golden/{SIZE}.safetensors"])
def test_one_flipped_bit_in_a_small_file(folder, name):
    flip_a_bit(folder / name)
    with pytest.raises(IntegrityError, match="SHA-256 differs") as caught:
        open_bundle(folder)
    assert name in str(caught.value)


def test_one_flipped_bit_in_a_large_file_shows_when_every_hash_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(bundles, "ALWAYS_HASHED_BYTES", 10 << 20)
    flip_a_bit(folder / WEIGHTS)
    open_bundle(folder)
    with pytest.raises(IntegrityError, match=r"dit\.safetensors is damaged"):
        open_bundle(folder, every_hash=True)


def test_a_truncated_file(folder):
    path = folder / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"dit\.safetensors has another size"):
        open_bundle(folder)


def test_a_missing_file(folder):
    (folder / GRAPH).unlink()
    with pytest.raises(IntegrityError, match=r"dit\.64x96x9\.onnx is missing"):
        open_bundle(folder)


def test_a_link_does_not_pass_even_to_the_right_bytes(folder, tmp_path):
    (folder / GRAPH).rename(tmp_path / "elsewhere.onnx")
    (folder / GRAPH).symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="not a regular file"):
        open_bundle(folder)


def test_a_linked_folder_does_not_pass_either(folder, tmp_path):
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(IntegrityError, match="vae"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "vae/../../outside", "a\\b", "", ".", "./../outside"]
)
def test_a_file_name_that_leads_outside(folder, edit, tmp_path, name):
    (tmp_path / "outside").write_bytes(b"")
    edit(lambda data: data["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))
    with pytest.raises(IntegrityError, match="outside the bundle"):
        open_bundle(folder)


@pytest.mark.parametrize("field", ["file", "golden"])
def test_a_graph_that_names_a_file_of_no_record(folder, edit, field):
    edit(lambda data: data["graphs"][SIZE].update({field: "../outside"}))
    bundle = open_bundle(folder)
    with pytest.raises(IntegrityError, match=r"has no file \.\./outside"):
        bundle.path(str(getattr(bundle.graph(SIZE), field)))
