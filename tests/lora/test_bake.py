"""What baking changes, what it leaves, and what it refuses before it changes anything."""

import shutil

import pytest
import torch
from lora_files import LORA_A, LORA_B, SIZE, digest, digests, key_of
from safetensors.torch import load_file, save_file

from lcexport.builder import BuildOptions, build, options_from
from lcexport.checkpoint import read_header
from lcexport.configs.errors import (
    IncompatibleError,
    InputError,
    IntegrityError,
    LockedError,
    ResourceError,
    UsageError,
)
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.engines.bundle import open_bundle
from lcexport.engines.folders import FolderLock
from lcexport.engines.manifest import (
    LORA_BASE,
    WEIGHTS,
    EngineRecord,
    Manifest,
    manifest_json,
    read_manifest,
)
from lcexport.lora import LoraChoice, bake, remove
from lcexport.verify import verify

A, B = LoraChoice(path=LORA_A), LoraChoice(path=LORA_B)
GOLDEN = f"golden/{SIZE}.safetensors"
MERGED_BY_B = {
    f"blocks.{block}.{name}.weight"
    for block in range(3)
    for name in ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v", "ffn.w2")
}


def test_only_the_tensors_that_the_lora_names_change(bundle):
    header = (bundle / WEIGHTS).read_bytes()[: read_header(bundle / WEIGHTS).data_start]
    before = load_file(bundle / WEIGHTS)
    bake(bundle, [B], golden=False)
    after = load_file(bundle / WEIGHTS)
    assert {name for name in before if not torch.equal(before[name], after[name])} == MERGED_BY_B
    assert (bundle / WEIGHTS).read_bytes().startswith(header)


def test_the_manifest_names_the_loras_and_every_file(bundle):
    base = digests(bundle)
    done = bake(bundle, [LoraChoice(path=LORA_B, strength=-0.5)]).manifest
    (record,) = done.loras
    assert (record.name, record.strength, record.baked) == ("lora_b", -0.5, True)
    assert record.sha256 == digest(LORA_B)
    found = digests(bundle)
    del found["manifest.json"]
    assert found == {name: file.sha256 for name, file in done.files.items()}
    assert found[f"{LORA_BASE}/{WEIGHTS}"] == base[WEIGHTS] != found[WEIGHTS]
    assert found[f"{LORA_BASE}/{GOLDEN}"] == base[GOLDEN] != found[GOLDEN]
    assert read_manifest(bundle) == done
    assert open_bundle(bundle, every_hash=True).manifest == done


def test_who_has_the_old_weights_open_keeps_them(bundle):
    with (bundle / WEIGHTS).open("rb") as held:
        before = held.read()
        bake(bundle, [B], golden=False)
        held.seek(0)
        assert held.read() == before
    assert (bundle / WEIGHTS).read_bytes() != before


def test_a_second_bake_starts_from_the_base(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    bake(bundle, [A])
    bake(bundle, [B])
    bake(other, [B])
    assert digests(bundle) == digests(other)


def test_what_is_in_already_is_not_baked_again(bundle):
    bake(bundle, [B])
    before = (bundle / WEIGHTS).stat()
    bake(bundle, [B])
    assert (bundle / WEIGHTS).stat().st_ino == before.st_ino
    bake(bundle, [B, B])
    assert (bundle / WEIGHTS).stat().st_ino != before.st_ino


def test_without_golden_outputs_verify_says_so(bundle):
    base = digests(bundle)
    bake(bundle, [B], golden=False)
    assert not (bundle / GOLDEN).exists()
    assert verify(bundle, "load").ok
    with pytest.raises(InputError, match=r"no golden data .*baked in with --no-golden"):
        verify(bundle, "step")
    bake(bundle, [B])
    assert verify(bundle, "step").ok
    bake(bundle, [B], golden=False)
    remove(bundle)
    assert digests(bundle) == base


def test_a_resolution_added_while_loras_are_in(bundle):
    bake(bundle, [B])
    manifest = read_manifest(bundle)
    preset = preset_from("64x64x5").model_copy(update={"text_tokens": 10})
    added = BuildOptions(model=bundle, output=bundle, presets=(preset,), add=True)
    build(added)
    assert verify(bundle).ok
    with_lora = load_file(bundle / "golden/64x64x5.safetensors")
    remove(bundle)
    assert verify(bundle).ok
    without = load_file(bundle / "golden/64x64x5.safetensors")
    assert not torch.equal(with_lora["velocity_cond"], without["velocity_cond"])
    assert not (bundle / "lora").exists()
    assert read_manifest(bundle).files[WEIGHTS] == manifest.files[f"{LORA_BASE}/{WEIGHTS}"]


def test_built_in_loras_stay(golden_checkpoint, tmp_path):
    folder = tmp_path / "bundle"
    options = options_from(model=golden_checkpoint, res=SIZE, output=folder, loras=["a:0.5"])
    build(options.model_copy(update={"only": "export"}))
    built = digests(folder)
    with pytest.raises(UsageError, match=r"no LoRA was baked.*got a_lora, built in.*build without"):
        remove(folder)
    bake(folder, [B])
    assert [record.name for record in read_manifest(folder).loras] == ["a_lora", "lora_b"]
    remove(folder)
    assert digests(folder) == built


def test_a_build_is_not_resumed_with_another_lora(golden_checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise ResourceError("stopped")

    words = {"model": golden_checkpoint, "res": SIZE, "output": tmp_path / "b", "only": "export"}
    with monkeypatch.context() as patched:
        patched.setattr("lcexport.builder.run.components_stage", fail)
        with pytest.raises(ResourceError, match="stopped"):
            build(options_from(**words, loras=["a"]))
    with pytest.raises(UsageError, match="started differently; got another loras"):
        build(options_from(**words, loras=["a:0.5"], resume=True))
    assert build(options_from(**words, loras=["a"], resume=True)).manifest.loras[0].name == "a_lora"


def test_options_that_are_refused(golden_checkpoint):
    with pytest.raises(InputError, match="there is no LoRA c: no such file"):
        options_from(model=golden_checkpoint, res=SIZE, loras=["c"])
    with pytest.raises(UsageError, match="`lcexport lora bake` changes a bundle's"):
        options_from(model=golden_checkpoint, res=SIZE, loras=["a"], add=True)


def test_a_lora_of_another_model_leaves_no_trace(bundle, demo_checkpoint, make_lora, tmp_path):
    before = digests(bundle)
    foreign = LoraChoice(path=make_lora(modules=("blocks.3.ffn.w1",)))
    with pytest.raises(InputError, match=r"blocks\.3\.ffn\.w1 is no Linear layer"):
        bake(bundle, [A, foreign])
    tensors = load_file(LORA_A)
    tensors[key_of("blocks.0.ffn.w1", "lora_down.weight")][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.w1 holds NaN"):
        bake(bundle, [LoraChoice(path=tmp_path / "nan.safetensors")])
    with pytest.raises(InputError, match="does not fit F32"):
        bake(bundle, [LoraChoice(path=LORA_A, strength=3e38)] * 400)
    assert digests(bundle) == before
    assert not (bundle / "lora").exists()


def test_what_is_no_bundle_is_said(tmp_path):
    with pytest.raises(IntegrityError, match="not a bundle"):
        bake(tmp_path, [A])
    with pytest.raises(UsageError, match="no LoRA was named"):
        bake(tmp_path, [])


def test_nothing_to_remove_is_said(bundle):
    with pytest.raises(UsageError, match=r"no LoRA was baked into the bundle \S+$"):
        remove(bundle)


def test_a_bundle_that_is_being_written_is_left_alone(bundle):
    lock = FolderLock()
    lock.take(bundle, bundle)
    with pytest.raises(LockedError):
        bake(bundle, [A])
    lock.release()


@pytest.mark.parametrize("which", [WEIGHTS, f"{LORA_BASE}/{WEIGHTS}"])
def test_damaged_weights_are_not_given_a_new_digest(bundle, which):
    if which != WEIGHTS:
        bake(bundle, [A], golden=False)
    data = bytearray((bundle / which).read_bytes())
    data[-5] ^= 1
    (bundle / which).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{which} is damaged"):
        bake(bundle, [B], golden=False)


def test_a_machine_too_small_for_golden_outputs_is_told_before(bundle, monkeypatch):
    before = digests(bundle)
    monkeypatch.setattr("lcexport.lora.baking.available_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"whole model in memory.*--no-golden"):
        bake(bundle, [A])
    assert digests(bundle) == before
    bake(bundle, [A], golden=False)


def test_a_bake_without_golden_outputs_makes_no_dit(bundle, monkeypatch):
    monkeypatch.setattr("lcexport.lora.baking.dit_from_files", None)
    bake(bundle, [A], golden=False)
    assert read_manifest(bundle).baked


def with_engine(manifest: Manifest, **changes) -> Manifest:
    """The manifest with one compiled engine."""
    options = {"strip_plan": False, "refit": False, **changes.pop("options", {})}
    engine = EngineRecord(
        plans=(), product="tensorrt", version="10", platform="x", compute_capabilities=(),
        gpu=None, driver=None, options=options, verified=False, **changes,
    )  # fmt: skip
    return manifest.model_copy(update={"engines": {"tensorrt": {SIZE: engine}}})


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, False),
        ({"options": {"refit": True}}, True),
        ({"options": {"strip_plan": True}}, True),
        ({"calls": ({"plan": 0, "prefix": "", "tensors": {}},)}, True),
        ({"options": {"refit": True}, "ep_context": "x.onnx"}, False),
    ],
)
def test_plans_whose_weights_cannot_be_exchanged_are_named(bundle, changes, possible):
    manifest = with_engine(read_manifest(bundle), **changes)
    (bundle / "manifest.json").write_bytes(manifest_json(manifest))
    before = digests(bundle)
    if possible:
        assert bake(bundle, [A], golden=False).manifest.engines == manifest.engines
        return
    with pytest.raises(IncompatibleError, match=rf"cannot be exchanged; got tensorrt for {SIZE}"):
        bake(bundle, [A])
    assert digests(bundle) == before


def test_plans_with_weights_inside_are_not_added_to_baked_bundles(make_bundle, tmp_path):
    from lcexport.builder.run import addable_bundle

    folder = shutil.copytree(make_bundle("bf16"), tmp_path / "copy")
    options = BuildOptions(
        model=folder, output=folder, presets=(preset_from("64x64x5"),), add=True,
        precision="bf16", backends=("tensorrt-rtx",), only="compile",
    )  # fmt: skip
    jobs = jobs_for(preset_from("64x64x5"), "t2v")
    assert not addable_bundle(options, jobs).baked
    bake(folder, [A], golden=False)
    with pytest.raises(UsageError, match=r"would keep them.*--weights shared"):
        addable_bundle(options, jobs)
    assert addable_bundle(options.model_copy(update={"weights": "shared"}), jobs).baked
