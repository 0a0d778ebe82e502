"""Bundles to qualify, and subjects of them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import double
import onnx_ir as ir
import pytest
import torch

from lcexport.builder import BuildOptions, build
from lcexport.engines.bundle import Bundle
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import MANIFEST, read_manifest
from lcexport.qualify import costs, speed
from lcexport.qualify.subject import Subject

SIZE = "64x96x9"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two rounds of timing, and no compiling by torch."""
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(speed, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(speed, "WARM_UPS", 1)
    monkeypatch.setattr(torch, "compile", lambda module: module)


@pytest.fixture(scope="session")
def polygraphy() -> None:
    """Skips where the optional extra is not installed."""
    pytest.importorskip("polygraphy")


@pytest.fixture(scope="session")
def pair_bundle(demo_options: BuildOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `demo_bundle`, with two samples per call. Read only."""
    output = tmp_path_factory.mktemp("pairs") / "bundle"
    build(demo_options.model_copy(update={"output": output, "batch": 2}))
    return output


@pytest.fixture(scope="session")
def double_bundle(pair_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pair_bundle` with an engine of the double: two segments that can be refitted. Read only."""
    folder = Path(shutil.copytree(pair_bundle, tmp_path_factory.mktemp("double") / "bundle"))
    double.add_engine(folder, SIZE, 2, refittable=True)
    return folder


@pytest.fixture(scope="session")
def shared_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo_bundle` with an engine of the double whose weights are handed in. Read only."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("shared") / "bundle"))
    double.add_engine(folder, SIZE, 0)
    return folder


@pytest.fixture
def the_double(monkeypatch):
    """The test double as the `tensorrt` backend, in this process and in a cold start's."""
    module = double.load_double()
    module.reset()
    double.install(monkeypatch.setattr)
    script = str(Path(__file__).with_name("cold_double.py"))
    monkeypatch.setattr(costs, "COMMAND", (sys.executable, script))
    yield module
    module.reset()


@pytest.fixture
def subject_of(tmp_path: Path) -> Callable[..., Subject]:
    """`subject_of(bundle, "tensorrt")`: its engine on a processor."""

    def make(folder: Path, backend: str = "onnxruntime", device: str = "cpu") -> Subject:
        bundle = Bundle(folder, read_manifest(folder))
        return Subject(bundle, SIZE, backend, torch.device(device), tmp_path)

    return make


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """`damaged(bundle)`: a copy whose graph, in each form, gives block 1 the weights of block 2."""

    def damage(bundle: Path) -> Path:
        folder = Path(shutil.copytree(bundle, tmp_path / "damaged"))
        for path in (folder / f"dit.{SIZE}.onnx", folder / f"dit.{SIZE}.ort.onnx"):
            if path.exists():  # ONNX Runtime's form is there in float32 alone
                exchange(path)
                reseal(folder, path.name)
        return folder

    def exchange(path: Path) -> None:
        model = ir.load(path)
        weights = model.graph.initializers
        for name in [name for name in weights if name.startswith("blocks.1.ffn.")]:
            weights[name].const_value = weights[name.replace("blocks.1.", "blocks.2.")].const_value
        path.write_bytes(with_own_names(model))

    return damage


def with_own_names(model: ir.Model) -> bytes:
    """The graph's bytes; a tensor is written under its value's name."""
    proto = ir.to_proto(model)
    for tensor, name in zip(proto.graph.initializer, model.graph.initializers, strict=True):
        tensor.name = name
    return proto.SerializeToString()


def reseal(folder: Path, name: str) -> None:
    """Make the manifest believe a changed file."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    path = folder / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
