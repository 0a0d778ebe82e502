"""Refitting on the double: every weight by name, exact there and back."""

import pytest
import torch
from safetensors.torch import load_file

from lcexport.configs.errors import IntegrityError, LcexportError, UsageError

REFITTABLE = {"refittable": True}
STRIPPED = {"stripped": True}


@pytest.fixture(scope="module")
def base(make_weights) -> dict[str, torch.Tensor]:
    return load_file(make_weights("fp32"))


@pytest.fixture(scope="module")
def other(base) -> dict[str, torch.Tensor]:
    """The same with another output projection."""
    return base | {"final_layer.proj.weight": base["final_layer.proj.weight"] * 1.5 + 0.125}


@pytest.mark.parametrize("segments", [1, 3])
def test_base_then_other_then_base_is_exact(open_engine, velocity, base, other, segments):
    engine = open_engine(segments, plan=REFITTABLE, cuda_graph=True)
    first = velocity(engine)
    engine.refit(other)
    changed = velocity(engine)
    assert not torch.equal(changed, first)
    engine.refit(base)
    assert torch.equal(velocity(engine), first)
    engine.refit(other)
    assert torch.equal(velocity(engine), changed)


def test_a_stripped_plan_is_filled_before_its_first_run(open_engine, velocity, base):
    engine = open_engine(3, plan=STRIPPED, weights=base)
    assert torch.equal(velocity(engine), velocity(open_engine(3)))


def test_what_was_recorded_is_forgotten(open_engine, inputs, output, base, ops):
    engine = open_engine(1, plan=REFITTABLE, cuda_graph=True)
    for _ in range(3):
        engine.run(inputs, {"velocity": output})
    engine.refit(base)
    del ops.events[:]
    engine.run(inputs, {"velocity": output})
    assert ops.events == ["enter", "leave"]


def test_a_plan_that_cannot_be_refitted(open_engine, base):
    with pytest.raises(UsageError, match=r"cannot be refitted.*refit=true"):
        open_engine(1).refit(base)


def test_a_weight_that_is_missing(open_engine, base):
    few = {name: tensor for name, tensor in base.items() if name != "final_layer.proj.bias"}
    with pytest.raises(IntegrityError, match=r"lack 1 of the engine's \d+; .*proj.bias"):
        open_engine(1, plan=STRIPPED, weights=few)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (torch.Tensor.half, "proj.bias does not fit.*HALF; wanted.*FLOAT"),
        (lambda bias: bias[:3], "proj.bias does not fit the engine; got 3 x"),
        (torch.Tensor.double, "a type that is not refitted; got torch.float64"),
    ],
)
def test_a_weight_that_does_not_fit(open_engine, velocity, base, change, match):
    engine = open_engine(1, plan=REFITTABLE)
    before = velocity(engine)
    wrong = base | {"final_layer.proj.bias": change(base["final_layer.proj.bias"])}
    with pytest.raises(IntegrityError, match=match):
        engine.refit(wrong)
    assert torch.equal(velocity(engine), before)


def test_a_refitter_that_cannot_be_made(open_engine, base, double):
    engine = open_engine(1, plan=REFITTABLE)
    double.failures.add("Refitter.__init__")
    with pytest.raises(LcexportError, match=r"refused a refit; got no refitter: .*nullptr"):
        engine.refit(base)


@pytest.mark.parametrize(
    "call", ["Refitter.set_named_weights:final_layer.proj.bias", "Refitter.refit_cuda_engine"]
)
def test_a_refit_that_tensorrt_refuses(open_engine, base, double, call):
    engine = open_engine(1, plan=REFITTABLE)
    double.failures.add(call)
    with pytest.raises(LcexportError, match=r"refused a refit; got \w+.*False.*open it again"):
        engine.refit(base)
