"""Plans without weights on the double: one block for all, one set of weights for all sizes."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trt_plans import HERE, with_plans

from lcexport.builder import BuildOptions, build
from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines import weights as weights_module
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import FileRecord, read_manifest
from lcexport.engines.ort import OrtEngine
from lcexport.engines.trt import backend
from lcexport.engines.trt.backend import engine_from, run_options
from lcexport.engines.trt.memory import Workspace
from lcexport.engines.trt.runtime import RunOptions
from lcexport.golden import BRANCHES, branch_inputs, golden_inputs, read_golden, run_branch

SIZE, OTHER = "64x96x9", "96x64x9"


@pytest.fixture(scope="module")
def folder(two_size_bundle, tmp_path_factory) -> Path:
    return with_plans(two_size_bundle, tmp_path_factory.mktemp("shared") / "bundle", 0).folder


@pytest.fixture
def bundle(folder) -> Bundle:
    return Bundle(folder, read_manifest(folder))


@pytest.fixture
def open_size(bundle, product, workspace):
    opened = []

    def make(resolution: str = SIZE, **arguments):
        opened.append(engine_from(product, HERE, bundle, resolution, workspace, **arguments))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("size", [SIZE, OTHER])
def test_it_computes_what_onnx_runtime_computes(bundle, open_size, size):
    golden = read_golden(bundle, size)
    with OrtEngine(bundle.path(f"dit.{size}.onnx")) as reference:
        engine = open_size(size)
        assert (engine.inputs, engine.outputs) == (reference.inputs, reference.outputs)
        for branch in BRANCHES:
            found = run_branch(engine, golden, branch)
            torch.testing.assert_close(found, run_branch(reference, golden, branch))
            error = difference(found, golden[f"velocity_{branch}"])
            assert STEP_TOLERANCE["fp32"].holds(error)


def test_integers_are_handed_in_as_they_are_stored(demo_checkpoint, product, workspace, tmp_path):
    source = tmp_path / "int8"
    options = BuildOptions(
        model=demo_checkpoint, output=source, presets=(preset_from(SIZE),), only="export",
        weights_dtype="int8",
    )  # fmt: skip
    build(options)
    bundle = with_plans(source, tmp_path / "bundle", 0)
    with (
        OrtEngine(bundle.path(f"dit.{SIZE}.onnx")) as reference,
        engine_from(product, HERE, bundle, SIZE, workspace) as engine,
    ):
        weights = engine.shared_weights.tensors
        assert weights["blocks.0.ffn.w1.weight_int8"].dtype == torch.int8
        golden = golden_inputs(reference)
        wanted = run_branch(reference, golden, "cond")
        torch.testing.assert_close(run_branch(engine, golden, "cond"), wanted)


def test_plans_that_were_built_elsewhere_say_how_to_build_the_same_here(
    bundle, product, workspace, monkeypatch
):
    monkeypatch.setattr(backend, "shared_weights", None)  # nothing is put on the device before
    monkeypatch.setattr(backend, "TrtEngine", None)  # nor a plan opened
    other = replace(HERE, gpu="another double")
    match = "another GPU; .*Rebuild it here: lcexport build .*--device cuda --weights shared -o NEW"
    with pytest.raises(IncompatibleError, match=match):
        engine_from(product, other, bundle, SIZE, workspace)


def test_two_size_bundle_use_one_set_of_weights_and_one_workspace(bundle, open_size, workspace):
    first = open_size(SIZE)
    second = open_size(OTHER, like=first)
    assert second.shared_weights is first.shared_weights
    assert second.workspace is first.workspace
    for engine, size in ((first, SIZE), (second, OTHER), (first, SIZE)):
        golden = read_golden(bundle, size)
        error = difference(run_branch(engine, golden, "cond"), golden["velocity_cond"])
        assert STEP_TOLERANCE["fp32"].holds(error)


def test_a_weight_that_the_file_lacks_is_said_on_opening(bundle, open_size, monkeypatch):
    few = load_file(bundle.path("dit.safetensors"))
    del few["blocks.1.ffn.w1.weight"]
    monkeypatch.setattr(weights_module, "map_weights", lambda path: few)
    with pytest.raises(IntegrityError, match=r"lacks weights of the engine.*blocks\.1\.ffn\.w1"):
        open_size()


def test_weights_of_another_bundle_are_not_taken(bundle, open_size):
    first = open_size()
    files = bundle.manifest.files
    other = FileRecord(
        bytes=files["dit.safetensors"].bytes, sha256=hashlib.sha256(b"other").hexdigest()
    )
    bundle.manifest = bundle.manifest.model_copy(
        update={"files": {**files, "dit.safetensors": other}}
    )
    assert open_size(like=first).shared_weights is not first.shared_weights


def test_base_then_other_then_base_is_exact_and_moves_nothing(bundle, open_size, ops):
    engine, golden = open_size(), read_golden(bundle, SIZE)
    base = load_file(bundle.path("dit.safetensors"))
    other = base | {"final_layer.proj.weight": base["final_layer.proj.weight"] * 2}
    first = run_branch(engine, golden, "cond")
    addresses = {name: tensor.data_ptr() for name, tensor in engine.shared_weights.tensors.items()}
    engine.refit(other)
    assert not torch.equal(run_branch(engine, golden, "cond"), first)
    engine.refit(base)
    assert torch.equal(run_branch(engine, golden, "cond"), first)
    for name, tensor in engine.shared_weights.tensors.items():
        assert tensor.data_ptr() == addresses[name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop("final_layer.proj.bias"), "lack 1 of .*proj.bias"),
        (
            lambda weights: weights.update({"final_layer.proj.bias": torch.zeros(3)}),
            r"proj.bias does not fit the engine; got torch.float32 \[3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(bundle, open_size, change, match):
    engine, golden = open_size(), read_golden(bundle, SIZE)
    first = run_branch(engine, golden, "cond")
    wrong = {name: tensor * 2 for name, tensor in load_file(bundle.path("dit.safetensors")).items()}
    change(wrong)
    with pytest.raises(IntegrityError, match=match):
        engine.refit(wrong)
    assert torch.equal(run_branch(engine, golden, "cond"), first)


def test_the_engine_gives_its_plans_back_and_leaves_the_weights_to_the_other(open_size, bundle):
    first = open_size(SIZE)
    second = open_size(OTHER, like=first)
    first.close()
    assert not first.shared_weights.tensors
    golden = read_golden(bundle, OTHER)
    error = difference(run_branch(second, golden, "cond"), golden["velocity_cond"])
    assert STEP_TOLERANCE["fp32"].holds(error)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weight_budget": "-1"}, "weight_budget.*got '-1'"),
        ({"weight_budget": "much"}, "weight_budget"),
        ({"budget": 3}, "the option budget.*wanted one of weight_budget, cuda_graph"),
        ({"cuda_graph": "true", "weight_budget": "auto"}, "exclude each other"),
    ],
)
def test_options_that_an_engine_does_not_take(given, match):
    with pytest.raises(UsageError, match=match):
        run_options(given)


def test_options_come_from_words():
    assert run_options({"weight_budget": "1024"}) == RunOptions(weight_budget=1024)
    assert run_options({"cuda_graph": "true"}) == RunOptions(cuda_graph=True)
    assert run_options({}) == RunOptions()


def test_a_recorded_run_of_shared_weights_is_replayed(bundle, open_size, ops):
    engine, golden = open_size(options=RunOptions(cuda_graph=True)), read_golden(bundle, SIZE)
    inputs = branch_inputs(golden, "cond")
    output = torch.empty_like(golden["velocity_cond"])
    for _ in range(2):
        engine.run(inputs, {"velocity": output})
    wanted = output.clone()
    del ops.events[:]
    engine.run(inputs, {"velocity": output.fill_(torch.nan)})
    assert ops.events == ["enter", "replay", "leave"]
    assert torch.equal(output, wanted)


def test_the_block_is_deserialised_once(open_size, workspace: Workspace):
    engine = open_size()
    assert len(engine._engines) == 3
    assert len(engine._contexts) == 3
    assert [step.plan for step in engine._steps] == [0, 1, 1, 1, 1, 2]
    assert workspace.bytes >= engine.workspace_bytes
