"""The original's own outputs with its own LoRAs, from baked and from built bundles."""

import json
import shutil

import pytest
import torch
from lora_files import LORA_A, LORA_B, SIZE, digest, digests
from safetensors.torch import load_file

from lcexport.builder import build, options_from
from lcexport.configs.dit import DiTConfig
from lcexport.eager import dit_from_files
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS, read_manifest
from lcexport.engines.trt.refit import overwrite
from lcexport.golden import run_once
from lcexport.lora import LoraChoice, bake, open_merge, remove, swapped
from lcexport.verify import verify

LIMIT = 2e-5
A, B = LoraChoice(path=LORA_A), LoraChoice(path=LORA_B)
CASES = {
    "output_a": [A],
    "output_a_merged": [A],
    "output_a_mult0p5": [LoraChoice(path=LORA_A, strength=0.5)],
    "output_a_plus_b": [A, B],
}


@pytest.fixture(scope="module")
def case(golden):
    return golden("lora_tiny")


def output_of(folder, case, backend: str = "onnxruntime") -> torch.Tensor:
    """The golden inputs through one of the bundle's engines."""
    with open_engine(backend, open_bundle(folder), SIZE) as engine:
        shapes = {spec.name: spec.shape for spec in engine.inputs}
        inputs = {
            "hidden_states": case["hidden_states"],
            "encoder_hidden_states": case["encoder_hidden_states"],
            "timestep": case["timestep"].expand(shapes["timestep"]).clone(),
            "encoder_attention_mask": case["encoder_attention_mask"].bool(),
        }
        return run_once(engine, inputs)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (found - wanted).abs().max().item()


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", CASES)
def test_a_baked_bundle_computes_what_the_original_does(bundle, case, name, backend):
    bake(bundle, CASES[name], golden=False)
    found = output_of(bundle, case, backend)
    assert apart(found, case[name]) < LIMIT
    same = {name, "output_a", "output_a_merged"} if CASES[name] == [A] else {name}
    others = {other for other in case.tensors if other.startswith("output")} - same
    assert len(others) >= 3
    assert all(apart(found, case[other]) > 100 * LIMIT for other in others)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_base_then_a_then_base_is_the_base(make_bundle, bundle, case, backend):
    before = digests(bundle)
    assert apart(output_of(bundle, case, backend), case["output_base"]) < LIMIT
    bake(bundle, [A])
    assert apart(output_of(bundle, case, backend), case["output_a"]) < LIMIT
    bake(bundle, [B, A])
    assert apart(output_of(bundle, case, backend), case["output_a_plus_b"]) < LIMIT
    remove(bundle)
    assert digests(bundle) == before == digests(make_bundle("fp32"))
    assert apart(output_of(bundle, case, backend), case["output_base"]) < LIMIT


def test_a_bundle_built_with_loras(golden_checkpoint, make_bundle, bundle, case, tmp_path):
    """Names are looked up in the checkpoint; the weights are those that baking gives."""
    preset = open_bundle(bundle).graph(SIZE).preset
    options = options_from(
        model=golden_checkpoint, res=SIZE, output=tmp_path / "built", loras=["a", "b:1"]
    ).model_copy(update={"presets": (preset,)})
    manifest = build(options).manifest
    assert apart(output_of(tmp_path / "built", case), case["output_a_plus_b"]) < LIMIT
    bake(bundle, [A, B], golden=False)
    assert digest(tmp_path / "built" / WEIGHTS) == digest(bundle / WEIGHTS)
    assert [(lora.name, lora.strength, lora.baked) for lora in manifest.loras] == [
        ("a_lora", 1.0, False), ("b", 1.0, False),
    ]  # fmt: skip
    assert [lora.sha256 for lora in manifest.loras] == [digest(LORA_A), digest(LORA_B)]
    assert manifest.effective["loras"] == [lora.model_dump() for lora in manifest.loras]
    assert manifest.source == read_manifest(make_bundle("fp32")).source
    assert str(golden_checkpoint) not in json.dumps(manifest.model_dump(mode="json"))
    assert verify(tmp_path / "built").ok


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verify_holds_engines_against_the_weights_that_are_in(make_bundle, precision, tmp_path):
    folder = shutil.copytree(make_bundle(precision), tmp_path / "copy")
    base = load_file(folder / f"golden/{SIZE}.safetensors")
    bake(folder, [A])
    report = verify(folder)
    assert report.ok
    steps = [check for check in report.checks if check.name.startswith("velocity ")]
    assert len(steps) == 2
    assert all("relative_l2" in check.got for check in steps)
    baked = load_file(folder / f"golden/{SIZE}.safetensors")
    assert torch.equal(baked["hidden_states"], base["hidden_states"])
    assert apart(baked["velocity_cond"], base["velocity_cond"]) > 0.01
    remove(folder)
    assert digests(folder) == digests(make_bundle(precision))


def test_an_open_eager_engine_takes_other_weights_in_place(make_bundle, case):
    folder = make_bundle("fp32")
    bundle = open_bundle(folder)
    base = load_file(folder / WEIGHTS)
    merge = open_merge([A, B], DiTConfig.from_json(bundle.path(DIT_CONFIG)))
    dit = dit_from_files(bundle.path(DIT_CONFIG), bundle.path(WEIGHTS))
    inputs = [case[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")]
    mask = case["encoder_attention_mask"].bool()

    def velocity() -> torch.Tensor:
        with torch.inference_mode():
            return dit(*inputs, mask)

    first = velocity()
    overwrite(dict(dit.named_parameters()), swapped(base, merge))
    assert apart(velocity(), case["output_a_plus_b"]) < LIMIT
    overwrite(dict(dit.named_parameters()), base)
    assert torch.equal(velocity(), first)


def test_a_bf16_bundle_is_rounded_once(make_bundle, tmp_path):
    """Every merged weight is the bfloat16 nearest to base plus change; islands stay float32."""
    folder = shutil.copytree(make_bundle("bf16"), tmp_path / "copy")
    base = load_file(folder / WEIGHTS)
    bake(folder, [A, B], golden=False)
    found = load_file(folder / WEIGHTS)
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert {found[name].dtype for name in changed} == {torch.bfloat16, torch.float32}
    assert all(found[name].dtype == base[name].dtype for name in base)
    name = "blocks.1.ffn.w2.weight"
    module = "lora___lorahyphen___blocks___lorahyphen___1___lorahyphen___ffn___lorahyphen___w2"
    total = base[name].double()
    for path, alpha in ((LORA_A, 0.5), (LORA_B, 0.75)):
        lora = load_file(path)
        up, down = (lora[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
        total += alpha * (up @ down)
    differ = found[name] != total.bfloat16()
    assert differ.double().mean() < 1e-3  # ties that FP32 sums decide otherwise
    assert name in changed
