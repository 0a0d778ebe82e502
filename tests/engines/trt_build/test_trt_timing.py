"""The timing cache, on a fake of the three calls: TensorRT for RTX measures nothing to keep.

The empty one that it makes of damaged bytes is its own; by its own warning its caches are no-ops.
"""

import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from lcexport.configs.errors import IncompatibleError, ResourceError
from lcexport.engines.trt.product import MessageLog, builder_for, logger_for
from lcexport.engines.trt.timing import TimingCache


class FakeCache:
    """Measurements of one GPU, serialised as JSON: `[gpu, [kernel, ...]]`."""

    def __init__(self, gpu: str, kernels: set[str]) -> None:
        self.gpu, self.kernels = gpu, kernels

    def combine(self, input_cache: "FakeCache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.gpu != input_cache.gpu:
            return False
        self.kernels |= input_cache.kernels
        return True

    def serialize(self) -> bytearray:
        return bytearray(json.dumps([self.gpu, sorted(self.kernels)]).encode())


class FakeConfig:
    """A builder configuration that has measured `kernels` on `gpu`; it reads what it can."""

    def __init__(self, gpu: str, *kernels: str) -> None:
        self.gpu, self.kernels = gpu, kernels
        self.cache: Any = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> FakeCache:
        try:
            gpu, kernels = json.loads(serialized_timing_cache)
        except ValueError:
            gpu, kernels = self.gpu, []
        return FakeCache(gpu, set(kernels))

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return cache.gpu == self.gpu

    def get_timing_cache(self) -> FakeCache:
        self.cache.kernels |= set(self.kernels)
        return self.cache


def config_on(gpu: str, *kernels: str) -> Any:
    """A `FakeConfig` in place of the real one."""
    return FakeConfig(gpu, *kernels)


def kernels_in(path: Path) -> list[str]:
    return json.loads(path.read_bytes())[1]


def build(path: Path, config: Any, *, named: bool = True) -> list[str]:
    """What there is to warn of."""
    cache = TimingCache(path, named)
    notes = cache.load(config)
    cache.merge(config)
    return notes


def test_a_first_build_makes_the_file_and_a_second_adds_to_it(tmp_path: Path):
    path = tmp_path / "cache"
    build(path, config_on("H200", "a"))
    build(path, config_on("H200", "b"))
    assert kernels_in(path) == ["a", "b"]


def test_builds_at_the_same_time_lose_nothing(tmp_path: Path):
    path = tmp_path / "cache"
    configs = [config_on("H200", f"kernel {i:02}") for i in range(12)]
    for config in configs:
        TimingCache(path).load(config)
    threads = [threading.Thread(target=TimingCache(path).merge, args=(c,)) for c in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels_in(path) == [f"kernel {i:02}" for i in range(12)]


def test_a_cache_of_another_gpu_is_refused_and_kept(tmp_path: Path):
    path = tmp_path / "cache"
    build(path, config_on("H200", "a"))
    with pytest.raises(IncompatibleError, match="another GPU"):
        build(path, config_on("RTX 4090", "b"))
    assert kernels_in(path) == ["a"]


def test_a_file_that_became_another_gpus_meanwhile_is_kept(tmp_path: Path):
    path = tmp_path / "cache"
    ours = config_on("H200", "a")
    TimingCache(path).load(ours)
    build(path, config_on("RTX 4090", "b"))
    with pytest.raises(IncompatibleError, match="another GPU"):
        TimingCache(path).merge(ours)
    assert kernels_in(path) == ["b"]


def test_a_damaged_cache_is_refused(tmp_path: Path):
    path = tmp_path / "cache"
    path.write_bytes(b"\0damaged")
    with pytest.raises(IncompatibleError, match="damaged"):
        build(path, config_on("H200"))
    assert path.read_bytes() == b"\0damaged"


def test_a_file_that_was_damaged_meanwhile_is_kept(tmp_path: Path):
    path = tmp_path / "cache"
    ours = config_on("H200", "a")
    TimingCache(path).load(ours)
    path.write_bytes(b"\0damaged")
    with pytest.raises(IncompatibleError, match="damaged"):
        TimingCache(path).merge(ours)
    assert path.read_bytes() == b"\0damaged"


def test_an_empty_cache_is_no_damaged_one(tmp_path: Path):
    path = tmp_path / "cache"
    build(path, config_on("H200"))
    assert build(path, config_on("H200", "a")) == []
    assert kernels_in(path) == ["a"]


@pytest.mark.parametrize("named", [True, False])
def test_the_empty_cache_that_the_real_library_makes_is_noticed(tmp_path: Path, rtx, named: bool):
    path = tmp_path / "cache"
    path.write_bytes(b"damaged" * 10)
    logger = logger_for(rtx, MessageLog())
    config = builder_for(rtx, logger).create_builder_config()
    if named:
        with pytest.raises(IncompatibleError, match="damaged"):
            TimingCache(path).load(config)
    else:
        (note,) = TimingCache(path, named=False).load(config)
        assert "damaged" in note
    assert path.read_bytes() == b"damaged" * 10


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")
def test_the_real_configuration_keeps_the_cache_alive(rtx):
    logger = logger_for(rtx, MessageLog())
    config = builder_for(rtx, logger).create_builder_config()
    cache = config.create_timing_cache(b"")
    kept = weakref.ref(cache)
    assert config.set_timing_cache(cache, ignore_mismatch=False)
    del cache
    assert kept() is not None
    del config
    assert kept() is None


def test_a_folder_that_is_not_there_is_said_before_building(tmp_path: Path):
    with pytest.raises(ResourceError, match="no such folder"):
        TimingCache(tmp_path / "none" / "cache").load(config_on("H200"))


@pytest.mark.parametrize("content", [b"\0damaged", b'["RTX 4090", ["b"]]'])
def test_a_file_that_nobody_named_is_begun_anew_with_a_warning(tmp_path: Path, content):
    path = tmp_path / "cache"
    path.write_bytes(content)
    (note,) = build(path, config_on("H200", "a"), named=False)
    assert "measured anew" in note
    assert str(path) in note
    assert json.loads(path.read_bytes()) == ["H200", ["a"]]
    assert build(path, config_on("H200", "c"), named=False) == []
    assert kernels_in(path) == ["a", "c"]
