"""A product that is missing, broken or too old is said to be just that."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines.trt.product import (
    KEPT_MESSAGES,
    MessageLog,
    Product,
    builder_for,
    logger_for,
    open_product,
    version_from,
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`install("raise ImportError")` makes a module `tensorrt` of that text importable."""

    def make(text: str) -> None:
        (tmp_path / "tensorrt.py").write_text(text)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.modules.pop("tensorrt", None)


def test_the_real_product_opens_with_its_version(rtx: Product):
    assert rtx.is_rtx
    assert rtx.version >= (1, 7)
    assert str(rtx) == f"tensorrt-rtx {rtx.trt.__version__}"


def test_an_unknown_product_is_a_usage_error():
    with pytest.raises(UsageError, match="tensorrt, tensorrt-rtx"):
        open_product("openvino")


@pytest.mark.parametrize(
    ("name", "extra"),
    [("tensorrt", r"lcexport\[tensorrt\]"), ("tensorrt-rtx", r"lcexport\[tensorrt-rtx\]")],
)
def test_a_missing_product_says_what_to_install(name, extra, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(IncompatibleError, match=f"pip install '{extra}'"):
        open_product(name)


def test_bindings_without_their_library_name_the_library(install):
    install("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(
        IncompatibleError, match=r"libraries are not; got .*libnvinfer_plugin\.so\.11"
    ):
        open_product("tensorrt")


def test_bindings_without_the_package_around_them_will_do(tmp_path, monkeypatch):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("the whole product is installed")
    (tmp_path / "tensorrt_bindings.py").write_text("__version__ = '11.4.0.106'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(open_product("tensorrt")) == "tensorrt 11.4.0.106"
    del sys.modules["tensorrt_bindings"]


def test_a_library_of_somebody_elses_is_not_taken_for_tensorrts(install):
    install("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(IncompatibleError, match=r"does not load; got libcudart\.so\.13"):
        open_product("tensorrt")


@pytest.mark.parametrize("error", ["OSError('libcuda.so.1: not found')", "RuntimeError()"])
def test_a_library_that_fails_to_load_is_explained(install, error):
    install(f"raise {error}")
    with pytest.raises(IncompatibleError, match="NVIDIA's driver"):
        open_product("tensorrt")


def test_an_old_version_is_refused_with_the_command_to_upgrade(install):
    install("__version__ = '10.3.0'")
    with pytest.raises(IncompatibleError, match=r"wanted 10\.14 .*pip install --upgrade"):
        open_product("tensorrt")


def test_a_machine_without_gpu_is_told_so_when_the_builder_is_made(install):
    install(
        "__version__ = '11.4.0.106'\n"
        "def Builder(logger):\n"
        "    raise TypeError('pybind11::init(): factory function returned nullptr')\n"
    )
    product = open_product("tensorrt")
    logger: Any = None  # it fails before it looks
    with pytest.raises(IncompatibleError, match=r"nullptr.* a GPU .*tensorrt-rtx` needs none"):
        builder_for(product, logger)


@pytest.mark.parametrize(
    ("text", "version"),
    [("10.14.1.48", (10, 14, 1, 48)), ("11.0.0.post1", (11, 0, 0)), ("unknown", ())],
)
def test_versions_are_compared_as_numbers(text, version):
    assert version_from(text) == version


def test_the_log_keeps_the_last_messages_of_each_severity():
    seen: list[tuple[str, str]] = []
    log = MessageLog(lambda severity, message: seen.append((severity, message)))
    for number in range(KEPT_MESSAGES + 5):
        log.add("ERROR", str(number))
    log.add("WARNING", "slow")
    log.add("WARNING", "A node named node_mul already exists, the output tensors of this ...")
    log.add("VERBOSE", "chatter")
    assert len(log.errors) == KEPT_MESSAGES
    assert log.errors[-1] == str(KEPT_MESSAGES + 4)
    assert list(log.warnings) == ["slow"]
    assert len(seen) == KEPT_MESSAGES + 6


def test_a_second_logger_is_warned_that_it_is_ignored_and_hears_all(rtx: Product):
    """The reason for `shared_logger`: what is said and what is done differ."""
    first, second = MessageLog(), MessageLog()
    loggers = [logger_for(rtx, log) for log in (first, second)]
    runtimes = [rtx.trt.Runtime(logger) for logger in loggers]
    assert any("new logger is ignored" in message for message in second.warnings)
    first.errors.clear()
    assert runtimes[1].deserialize_cuda_engine(b"no plan" * 100) is None
    assert second.errors
    assert not first.errors


def test_the_real_builder_talks_to_the_log(rtx: Product):
    log = MessageLog()
    logger = logger_for(rtx, log)
    builder = builder_for(rtx, logger)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(rtx.trt.MemoryPoolType.WORKSPACE, 1 << 20)
    assert builder.build_serialized_network(builder.create_network(0), config) is None
    assert any("at least one output" in message for message in log.errors)
