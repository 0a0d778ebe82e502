"""What lcexport says of enterprise TensorRT in each state short of working, with the real bindings.

Each state is an error of its own that names what is missing, the same from `doctor` and from
`build`, and it comes before anything is built.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bindings_shim import make_shim, unpack_bindings

from lcexport.engines.trt.memory import missing_gpu

VERSION = "11.4.0.106"
COMMAND = (sys.executable, "-c", "from lcexport.cli import main; main()")
ASK = ("doctor", "--backend", "tensorrt", "--precision", "bf16", "--json")
Say = Callable[..., tuple[dict, str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_gpu() is None, reason="there is a GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed"
    ),
]


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bindings")
    unpack_bindings(folder, VERSION)
    return folder


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    make_shim(folder, VERSION.partition(".")[0])
    return folder


def lcexport(words: tuple, paths: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    """The command, with each of `paths` put before what its variable holds."""
    added = {
        name: os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])
        for name, path in paths.items()
    }
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        env={**os.environ, **added},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def say(demo_checkpoint: Path, tmp_path: Path) -> Say:
    """`say(PYTHONPATH=bindings)` is the product in `doctor`'s document, and `build`'s error."""

    def ask(**paths: Path) -> tuple[dict, str]:
        doctor = lcexport(ASK, paths)
        (product,) = (p for p in json.loads(doctor.stdout)["products"] if p["name"] == "tensorrt")
        build = lcexport(
            ("build", "--model", demo_checkpoint, "--res", "demo", "--precision", "bf16",
             "--backend", "tensorrt", "-o", tmp_path / "bundle"),
            paths,
        )  # fmt: skip
        assert build.returncode == doctor.returncode == 5
        assert build.stderr == doctor.stderr
        assert len(build.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
        return product, build.stderr

    return ask


def test_it_is_not_installed(say: Say):
    product, error = say()
    assert (product["installed"], product["loads"], product["builder"]) == (False, False, False)
    assert "tensorrt is not installed. pip install 'lcexport[tensorrt]'" in error
    assert f"this machine has {missing_gpu()}" in error


def test_the_bindings_are_there_and_every_library_that_is_not_is_named(say: Say, bindings: Path):
    product, error = say(PYTHONPATH=bindings)
    assert (product["installed"], product["loads"], product["builder"]) == (True, False, False)
    assert "tensorrt is installed but does not load" in error
    assert "got no libnvinfer.so.11, no libnvinfer_plugin.so.11, no libnvonnxparser.so.11" in error
    assert f"this machine has {missing_gpu()}" in error


def test_one_library_that_is_missing_is_named_alone(
    say: Say, bindings: Path, libraries: Path, tmp_path_factory: pytest.TempPathFactory
):
    some = tmp_path_factory.mktemp("some")
    for name in ("libnvinfer.so.11", "libnvinfer_plugin.so.11"):
        (some / name).symlink_to(libraries / name)
    _, error = say(PYTHONPATH=bindings, LD_LIBRARY_PATH=some)
    assert "got no libnvonnxparser.so.11; wanted" in error


def test_all_is_there_but_a_gpu(say: Say, bindings: Path, libraries: Path):
    product, error = say(PYTHONPATH=bindings, LD_LIBRARY_PATH=libraries)
    assert (product["installed"], product["loads"], product["builder"]) == (True, True, False)
    assert product["version"] == VERSION
    assert "cannot make a builder here" in product["error"]["message"]
    assert f"tensorrt {VERSION} builds on the GPU it builds for" in error
    assert f"got device cpu on a machine with {missing_gpu()}" in error
    assert "`--backend tensorrt-rtx` compiles without a GPU" in error
