"""LoRAs in TensorRT's plans, on the double: refitted while open, and refitted when opened."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trt_plans import HERE, with_plans

from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.dit import DiTConfig
from lcexport.dit import dit_from_tensors
from lcexport.engines.bundle import open_bundle
from lcexport.engines.trt.backend import engine_from
from lcexport.golden import BRANCHES, read_golden, run_branch
from lcexport.lora import LoraChoice, bake, open_merge, remove, swapped

SIZE = "64x96x9"
LORA = Path(__file__).parents[2] / "golden" / "lora_tiny" / "lora_a.safetensors"


def test_an_open_engine_is_given_loras_and_the_base_again(
    open_engine, velocity, inputs, make_weights, dit_folder
):
    config = DiTConfig.from_json(dit_folder / "config.json")
    base = load_file(make_weights("fp32"))
    merged = swapped(base, open_merge([LoraChoice(path=LORA)], config))
    engine = open_engine(3, plan={"refittable": True})
    first = velocity(engine)
    engine.refit(merged)
    with torch.inference_mode():
        wanted = dit_from_tensors(config, merged)(**inputs)
    assert STEP_TOLERANCE["fp32"].holds(difference(velocity(engine), wanted))
    assert not STEP_TOLERANCE["fp32"].holds(difference(velocity(engine), first))
    engine.refit(base)
    assert torch.equal(velocity(engine), first)


@pytest.fixture
def bundle(demo_bundle, double, tmp_path) -> Path:
    """A bundle whose plan holds the base's weights and can be refitted."""
    return with_plans(demo_bundle, tmp_path / "bundle", 1, refittable=True).folder


def test_plans_with_the_bases_weights_are_refitted_when_a_baked_bundle_is_opened(
    bundle, product, workspace
):
    def velocities() -> dict[str, torch.Tensor]:
        """The engine's, held against the golden ones of the weights that are in."""
        opened = open_bundle(bundle)
        golden = read_golden(opened, SIZE)
        with engine_from(product, HERE, opened, SIZE, workspace) as engine:
            found = {branch: run_branch(engine, golden, branch) for branch in BRANCHES}
        for branch, velocity in found.items():
            error = difference(velocity, golden[f"velocity_{branch}"])
            assert STEP_TOLERANCE["fp32"].holds(error)
        return found

    base = velocities()
    # The demo's DiT is as wide as the golden one, and deeper.
    bake(bundle, [LoraChoice(path=LORA, strength=0.5)])
    baked = velocities()
    assert difference(baked["cond"], base["cond"]).relative_l2 > 0.01
    remove(bundle)
    assert torch.equal(velocities()["cond"], base["cond"])
