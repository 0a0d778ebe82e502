"""Bundles with int8 weights: what they hold, what runs them, what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcexport.builder import BuildOptions, build, make_plan, open_source, options_from
from lcexport.checkpoint import convert, is_island, open_checkpoint, read_header
from lcexport.compare import difference
from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import WEIGHTS
from lcexport.golden import read_golden, run_branch

SIZE, MATRICES = "64x96x9", 2 + 4 * 11


@pytest.fixture(scope="module")
def int8_options(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildOptions:
    output = tmp_path_factory.mktemp("int8") / "bundle"
    return options_from(
        model=demo_checkpoint, res=SIZE, output=output, precision="fp32", weights_dtype="int8"
    )


@pytest.fixture(scope="module")
def int8_bundle(int8_options: BuildOptions) -> Path:
    build(int8_options)
    return int8_options.output


def test_what_the_bundle_holds(int8_bundle, int8_options, demo_bundle):
    manifest = open_bundle(int8_bundle).manifest
    assert (manifest.precision, manifest.weights_dtype) == ("fp32", "int8")
    assert open_bundle(demo_bundle).manifest.weights_dtype == "bulk"
    assert manifest.graphs[SIZE].precision_proof["weights_int8"] == MATRICES
    held = read_header(int8_bundle / WEIGHTS).tensors
    assert sum(info.dtype == "I8" for info in held.values()) == MATRICES
    assert {info.dtype for name, info in held.items() if is_island(name)} == {"F32"}
    planned = make_plan(open_source(int8_options), int8_options).weights_bytes
    assert planned == sum(info.bytes for info in held.values())
    assert planned < 0.4 * (demo_bundle / WEIGHTS).stat().st_size


def test_onnx_runtime_and_eager_torch_agree(int8_bundle):
    bundle = open_bundle(int8_bundle)
    golden = read_golden(bundle, SIZE)
    for backend in ("onnxruntime", "eager"):
        with open_engine(backend, bundle, SIZE) as engine:
            found = difference(run_branch(engine, golden, "cond"), golden["velocity_cond"])
        assert found.relative_l2 < 2e-5, backend


def test_a_resolution_is_added_from_the_integers(int8_bundle, int8_options):
    presets = (preset_from("64x64x5"),)
    changes = {"add": True, "presets": presets, "model": Path("nowhere")}
    with pytest.raises(UsageError, match="another weights_dtype; got bulk; wanted int8"):
        build(int8_options.model_copy(update={**changes, "weights_dtype": "bulk"}))
    before = (int8_bundle / WEIGHTS).read_bytes()
    bundle = build(int8_options.model_copy(update=changes))
    assert bundle.graph("64x64x5").precision_proof["weights_int8"] == MATRICES
    assert (int8_bundle / WEIGHTS).read_bytes() == before


def test_an_int8_checkpoint_keeps_its_integers(demo_checkpoint, int8_options, tmp_path):
    convert(demo_checkpoint, tmp_path / "int8", to="int8")
    changes = {"model": tmp_path / "int8", "output": tmp_path / "bundle", "only": "export"}
    build(int8_options.model_copy(update=changes))
    written = load_file(tmp_path / "bundle" / WEIGHTS)
    source = open_checkpoint(tmp_path / "int8").tensors["blocks.2.ffn.w1.weight_int8"]
    stored = load_file(source.path)
    name = "blocks.2.ffn.w1.weight_int8"
    assert torch.equal(written[name], stored[name])
    quantised = stored["blocks.2.adaLN_modulation.1.weight_int8"].float()
    scale = stored["blocks.2.adaLN_modulation.1.weight_scale"]
    assert torch.equal(written["blocks.2.adaln_linear_1.weight"], quantised * scale[:, None])


def test_the_default_name_says_int8(demo_checkpoint):
    named = options_from(model=demo_checkpoint, res=SIZE, precision="fp32", weights_dtype="int8")
    assert named.output.name == "demo-64x96x9-fp32-int8"


@pytest.mark.parametrize("wish", ["refit", "strip_plan"])
def test_integers_in_plans_cannot_be_exchanged(demo_checkpoint, wish):
    with pytest.raises(UsageError, match="int8 weights in plans cannot be exchanged"):
        options_from(
            model=demo_checkpoint, res=SIZE, precision="bf16", weights_dtype="int8",
            backends="tensorrt-rtx", trt={wish: "true"},
        )  # fmt: skip


def test_bfloat16_on_a_processor_is_refused_beforehand(int8_options, tmp_path):
    changes = {"precision": "bf16", "output": tmp_path / "bundle"}
    with pytest.raises(IncompatibleError, match="no bfloat16 arithmetic on processors"):
        build(int8_options.model_copy(update=changes))
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_a_usage_error(demo_checkpoint):
    with pytest.raises(UsageError, match="--weights-dtype"):
        options_from(model=demo_checkpoint, res=SIZE, weights_dtype="int4")


@pytest.mark.parametrize("weights", ["inside", "shared"])
def test_tensorrt_for_rtx_compiles_plans_of_integers(demo_checkpoint, tmp_path, weights):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    sizes = {}
    for dtype in ("int8", "bulk"):
        options = options_from(
            model=demo_checkpoint, res=SIZE, output=tmp_path / dtype, precision="bf16",
            weights_dtype=dtype, backends="tensorrt-rtx", targets="sm89", only="compile",
            weights=weights,
        )  # fmt: skip
        record = build(options).manifest.engines["tensorrt-rtx"][SIZE]
        sizes[dtype] = sum((tmp_path / dtype / plan.file).stat().st_size for plan in record.plans)
        handed = {w.dtype for plan in record.plans for w in plan.weights}
        assert ("int8" in handed) == (weights == "shared" and dtype == "int8")
    if weights == "inside":
        assert sizes["int8"] < sizes["bulk"]
