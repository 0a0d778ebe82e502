"""The eager engine: the bundle's weights in torch, behind the same contract."""

import pytest
import torch

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.eager import DitEngine
from lcexport.engines import TensorSpec, open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.eager import EagerEngine
from lcexport.golden import BRANCHES, read_golden, run_branch

SIZE = "64x96x9"


@pytest.fixture
def doubling() -> EagerEngine:
    specs = [TensorSpec(name, (2, 3), torch.float32) for name in ("x", "velocity")]
    return EagerEngine(
        lambda given: [2 * given["x"]], (specs[0],), (specs[1],), torch.device("cpu")
    )


def test_it_fills_the_callers_buffer(doubling):
    x, output = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3)
    doubling.run({"x": x}, {"velocity": output})
    assert torch.equal(output, 2 * x)
    assert not output.requires_grad


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(3, 2), r"got torch.float32 \[3, 2\]; wanted torch.float32 \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(3, 2).T, "x is not contiguous"),
    ],
)
def test_inputs_that_do_not_fit(doubling, x, match):
    with pytest.raises(UsageError, match=match):
        doubling.run({"x": x}, {"velocity": torch.zeros(2, 3)})


def test_tensors_on_another_device(doubling):
    here, elsewhere = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
    with pytest.raises(UsageError, match="engine tensor x is elsewhere; got meta; wanted cpu"):
        doubling.run({"x": elsewhere}, {"velocity": here})
    with pytest.raises(UsageError, match="engine tensor velocity is elsewhere"):
        doubling.run({"x": here}, {"velocity": elsewhere})


@pytest.mark.parametrize("output", [torch.zeros(4, 2, 3), torch.zeros(2, 3).half()])
def test_an_output_that_does_not_fit(doubling, output):
    with pytest.raises(UsageError, match="engine tensor velocity"):
        doubling.run({"x": torch.zeros(2, 3)}, {"velocity": output})


def test_a_closed_engine(doubling):
    with doubling:
        pass
    doubling.close()
    with pytest.raises(UsageError, match="closed"):
        doubling.run({"x": torch.zeros(2, 3)}, {"velocity": torch.zeros(2, 3)})


def test_engines_of_one_bundle_use_one_dit(demo_bundle):
    bundle = open_bundle(demo_bundle)
    with open_engine("eager", bundle, SIZE) as first:
        assert isinstance(first, DitEngine)
        second = open_engine("eager", bundle, SIZE, like=first)
        assert isinstance(second, DitEngine)
        assert second.dit is first.dit
    golden = read_golden(bundle, SIZE)  # the first is closed; the second goes on
    assert torch.equal(run_branch(second, golden, "cond"), golden["velocity_cond"])


def test_a_bundles_eager_engine_repeats_its_golden_outputs(demo_bundle):
    bundle = open_bundle(demo_bundle)
    golden = read_golden(bundle, SIZE)
    with open_engine("eager", bundle, SIZE) as engine:
        assert engine.backend == "eager"
        for branch in BRANCHES:
            got = run_branch(engine, golden, branch)
            torch.testing.assert_close(got, golden[f"velocity_{branch}"], rtol=0, atol=2e-5)


def test_cuda_that_is_not_there(demo_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IncompatibleError, match="--device cpu"):
        open_engine("eager", open_bundle(demo_bundle), SIZE, "cuda")
