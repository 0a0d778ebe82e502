"""Several resolutions of one bundle in one process."""

import pytest
import torch

from lcexport.configs.errors import UsageError
from lcexport.eager import DitEngine
from lcexport.runtime import load

SIZE, OTHER = "64x96x9", "96x64x9"
OPTIONS = {"steps": 2, "seed": 3, "output": "latents"}


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_second_resolution_is_the_one_a_pipeline_of_its_own_has(two_size_bundle, backend):
    with load(two_size_bundle, SIZE, backend) as pipe, load(two_size_bundle, OTHER) as alone:
        wanted = pipe.generate("a cat", **OPTIONS)
        other = pipe.at(OTHER)
        assert (other.preset.height, other.preset.width) == (96, 64)
        found = other.generate("a cat", **OPTIONS)
        torch.testing.assert_close(found, alone.generate("a cat", **OPTIONS), rtol=0, atol=1e-4)
        assert torch.equal(pipe.generate("a cat", **OPTIONS), wanted)


def test_the_model_is_in_memory_once(two_size_bundle):
    with load(two_size_bundle, SIZE, "eager") as pipe:
        first, second = pipe.engine, pipe.at(OTHER).engine
        assert isinstance(first, DitEngine)
        assert isinstance(second, DitEngine)
        assert second.dit is first.dit


def test_it_is_closed_with_the_first(two_size_bundle):
    with load(two_size_bundle, SIZE) as pipe:
        other = pipe.at(OTHER)
    for use in (lambda: other.generate("a cat"), lambda: pipe.at(OTHER)):
        with pytest.raises(UsageError, match="the pipeline is closed"):
            use()


def test_it_can_be_closed_before_the_first(two_size_bundle):
    with load(two_size_bundle, SIZE) as pipe:
        pipe.at(OTHER).close()
        assert pipe.generate("a cat", **OPTIONS).isfinite().all()


def test_a_resolution_the_bundle_lacks(two_size_bundle):
    with (
        load(two_size_bundle, SIZE) as pipe,
        pytest.raises(UsageError, match=rf"got '480p'; wanted one of {SIZE}, {OTHER}"),
    ):
        pipe.at("480p")
