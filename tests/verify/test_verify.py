"""Verification passes on a sound bundle and fails on each thing it exists to find."""

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.builder import BuildOptions, build
from lcexport.configs.errors import InputError, UsageError
from lcexport.engines.bundle import open_bundle
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import MANIFEST, read_manifest
from lcexport.golden import read_golden
from lcexport.runtime.guidance import plain_cfg
from lcexport.verify import Report, diagnostics, verify
from lcexport.verify.diagnostics import diagnose


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


def reseal(bundle: Path, name: str) -> None:
    """Make the manifest believe a changed file."""
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    path = bundle / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def failures(report: Report) -> set[str]:
    return {f"{check.level}: {check.name}" for check in report.failed}


@pytest.fixture(scope="module")
def sound(demo_bundle: Path) -> Report:
    return verify(demo_bundle, "video", backends=("onnxruntime", "eager"))


def test_a_sound_bundle_passes_every_level(sound):
    assert sound.ok
    assert not sound.failed
    assert {check.level for check in sound.checks} == {"hash", "load", "module", "step", "video"}


def test_each_module_and_each_step_has_its_row(sound, demo_bundle):
    names = [check.name for check in sound.checks if check.level == "module"]
    blocks = read_manifest(demo_bundle).graphs["64x96x9"].precision_proof["calls_of_block"]
    assert [name for name in names if name.startswith("blocks.")] == [
        f"blocks.{i}.x_next" for i in range(blocks)
    ]
    video = [check for check in sound.checks if check.level == "video"]
    assert [check.name for check in video] == [
        *(f"latents after step {i}" for i in (1, 2, 3, 4)),
        "frames",
    ]
    assert all(set(check.got) >= {"max_abs", "mean_abs", "cosine"} for check in video)


def test_the_report_is_json_and_says_its_schema(sound):
    document = json.loads(json.dumps(sound.as_dict()))
    assert document["schema_version"] == 1
    assert document["ok"] is True
    assert len(document["checks"]) == len(sound.checks)


def test_one_flipped_bit_fails_the_hashes_and_nothing_else_is_opened(copy):
    path = copy / "dit.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = verify(copy, "video")
    assert failures(report) == {"hash: dit.safetensors"}
    assert {check.level for check in report.checks} == {"hash"}


def test_other_reference_outputs_fail_the_step_level(copy):
    name = "golden/64x96x9.safetensors"
    golden = load_file(copy / name)
    golden["velocity_cond"] *= 1.001
    save_file(golden, copy / name)
    reseal(copy, name)
    assert failures(verify(copy, "step")) == {"step: velocity cond"}


def test_a_changed_graph_is_traced_to_its_module(copy):
    name = "dit.64x96x9.ort.onnx"  # what the engine runs
    graph = ir.load(copy / name)
    block = next(f for f in graph.functions.values() if f.name == "Block")
    norm = next(node for node in block if node.op_type == "LayerNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    (copy / name).write_bytes(ir.to_proto(graph).SerializeToString())
    reseal(copy, name)
    found = failures(verify(copy, "step"))
    assert {"module: blocks.0.x_next", "step: velocity cond"} <= found
    assert not {name for name in found if "embed" in name or name == "module: velocity"}


def test_a_bundle_without_golden_data_says_so(demo_options, tmp_path):
    options = demo_options.model_copy(update={"output": tmp_path / "b", "only": "export"})
    build(options)
    assert verify(tmp_path / "b", "load").ok
    with pytest.raises(InputError, match="--only export"):
        verify(tmp_path / "b", "step")


def test_a_bf16_bundle_verifies_with_eager_and_names_what_was_not_run(
    demo_options: BuildOptions, tmp_path
):
    options = demo_options.model_copy(
        update={"output": tmp_path / "b", "precision": "bf16", "backends": ("eager",)}
    )
    build(options)
    report = verify(tmp_path / "b", "step")
    assert report.ok
    # eager made the golden outputs: agreeing with itself proves nothing
    assert [check.name for check in report.checks if check.ok is None] == [
        "all modules",
        "velocity cond",
        "velocity uncond",
    ]
    assert all(
        check.wanted.startswith("not checked: ") for check in report.checks if check.ok is None
    )


def test_eager_that_differs_from_its_own_outputs_fails(copy):
    name = "golden/64x96x9.safetensors"
    golden = load_file(copy / name)
    golden["velocity_cond"] *= 1.001
    save_file(golden, copy / name)
    reseal(copy, name)
    assert "step: velocity cond" in failures(verify(copy, "step", backends=("eager",)))


def test_an_unknown_level_is_refused(demo_bundle):
    with pytest.raises(UsageError, match="hash, load, module, step, video"):
        verify(demo_bundle, "everything")


class CarelessEngine:
    """An engine that computes nothing and refuses nothing."""

    backend = "careless"
    device = torch.device("cpu")

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def run(self, inputs, outputs):
        outputs[self.outputs[0].name].zero_()


@pytest.fixture(scope="module")
def golden_data(demo_bundle: Path) -> dict[str, torch.Tensor]:
    return read_golden(open_bundle(demo_bundle), "64x96x9")


@pytest.fixture
def diagnosis(demo_bundle, golden_data):
    """`diagnosis(cond, uncond)`: names of the diagnostics that fail for these velocities."""
    from lcexport.engines import open_engine

    with open_engine("onnxruntime", open_bundle(demo_bundle), "64x96x9") as engine:

        def run(cond=None, uncond=None, engine=engine) -> list[str]:
            cond = golden_data["velocity_cond"] if cond is None else cond
            uncond = golden_data["velocity_uncond"] if uncond is None else uncond
            checks = diagnose(engine, golden_data, cond, uncond, "64x96x9")
            assert len(checks) == 6
            return [check.name for check in checks if not check.ok]

        yield run


def test_the_golden_velocities_pass_all_six_diagnostics(diagnosis):
    assert diagnosis() == []


def test_a_dead_output_is_found(diagnosis, golden_data):
    dead = torch.zeros_like(golden_data["velocity_cond"])
    assert {"output magnitude", "effect of the negation"} <= set(diagnosis(dead))


def test_text_without_effect_is_found(diagnosis, golden_data):
    assert "effect of the text" in diagnosis(uncond=golden_data["velocity_cond"])


def test_plain_guidance_in_place_of_cfg_zero_is_found(diagnosis, monkeypatch):
    monkeypatch.setattr(diagnostics, "cfg_zero", plain_cfg)
    assert diagnosis() == ["CFG-zero against plain guidance"]


def test_an_engine_of_the_other_sign_is_found(diagnosis, golden_data):
    wrong = {name: -golden_data[f"velocity_{name}"] for name in ("cond", "uncond")}
    assert diagnosis(**wrong) == ["effect of the negation"]


def test_an_engine_of_another_magnitude_is_found(diagnosis, golden_data):
    wrong = {name: 2 * golden_data[f"velocity_{name}"] for name in ("cond", "uncond")}
    assert diagnosis(**wrong) == ["output magnitude"]


def test_swapped_branches_are_found(diagnosis, golden_data):
    swapped = diagnosis(golden_data["velocity_uncond"], 1.3 * golden_data["velocity_cond"])
    assert {"CFG-zero against plain guidance", "st_star"} & set(swapped)


def test_noise_in_place_of_a_velocity_is_found(diagnosis, golden_data):
    noise = torch.randn_like(golden_data["velocity_cond"])
    assert {"effect of the negation", "st_star"} <= set(diagnosis(noise))


def test_a_step_without_the_negation_is_found(diagnosis, monkeypatch):
    def forgetful(latents, velocity, sigma, sigma_next):
        return latents + (sigma_next - sigma) * velocity

    monkeypatch.setattr(diagnostics, "euler_step", forgetful)
    assert diagnosis() == ["effect of the negation"]


def test_an_exploding_scale_is_found(diagnosis, golden_data):
    assert "st_star" in diagnosis(uncond=golden_data["velocity_cond"] * 1e-4)


def test_swapped_arguments_that_pass_in_silence_are_found(diagnosis, demo_bundle):
    from lcexport.engines import open_engine

    with open_engine("onnxruntime", open_bundle(demo_bundle), "64x96x9") as engine:
        careless = CarelessEngine(engine.inputs, engine.outputs)
    assert diagnosis(engine=careless) == ["swapped parameter order"]


def test_nan_fails_instead_of_passing_by(diagnosis, golden_data):
    broken = golden_data["velocity_cond"].clone()
    broken.flatten()[0] = float("nan")
    assert "output magnitude" in diagnosis(broken)
