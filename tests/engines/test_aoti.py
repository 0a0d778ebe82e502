"""AOTInductor's packages against the original's numbers, and what is refused before they run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcexport.builder import BuildOptions
from lcexport.builder.stages import file_record
from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.configs.presets import Preset
from lcexport.engines import aoti, open_engine
from lcexport.engines.aoti import AotiEngine
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.manifest import MANIFEST, manifest_json, read_manifest

BACKEND = "aotinductor"
ATOL = 2e-5  # float32, one forward pass


@pytest.fixture(scope="module")
def make(build_packages, dit_folder, tmp_path_factory):
    """`make(9)` is a bundle of packages of the golden DiT for that many frames, batch 2."""

    def made(frames: int, **options) -> Bundle:
        preset = Preset(name="tiny", height=64, width=96, frames=frames, text_tokens=10)
        output = tmp_path_factory.mktemp("packages") / "bundle"
        asked = BuildOptions(
            model=dit_folder, output=output, presets=(preset,), backends=(BACKEND,), batch=2,
            only="compile", **options,
        )  # fmt: skip
        return open_bundle(build_packages(asked))

    return made


@pytest.fixture(scope="module")
def bundle(make) -> Bundle:
    """Text to video. Read only."""
    return make(9)


@pytest.fixture(scope="module")
def continuing(make) -> Bundle:
    """Continuation: one graph makes the cache of two latent frames, one uses it. Read only."""
    return make(17, tasks=("vc",), cond_frames=5)


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    """A copy of the bundle to be spoiled."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    return folder


def inputs_of(case, latents: str = "hidden_states") -> dict[str, torch.Tensor]:
    """The golden inputs as an engine wants them: one timestep a frame, a boolean mask."""
    times = case["timestep"]
    if times.ndim == 1:
        times = times[:, None].expand(-1, case[latents].shape[2])
    return {
        "hidden_states": case[latents],
        "encoder_hidden_states": case["encoder_hidden_states"],
        "timestep": times.contiguous(),
        "encoder_attention_mask": case["encoder_attention_mask"].bool(),
    }


def run(engine, inputs) -> dict[str, torch.Tensor]:
    outputs = {
        spec.name: torch.full(spec.shape, torch.nan, dtype=spec.dtype) for spec in engine.outputs
    }
    engine.run(inputs, outputs)
    return outputs


def test_text_to_video_is_the_originals(bundle, golden):
    case = golden("dit_tiny_t2v")
    with open_engine(BACKEND, bundle, "tiny") as engine:
        for _ in range(2):  # nothing of a run is left to the next
            made = run(engine, inputs_of(case))["velocity"]
            torch.testing.assert_close(made, case["output_zero_pad"], rtol=0, atol=ATOL)


def test_image_to_video_is_the_originals(make, golden):
    case = golden("dit_tiny_i2v")
    with open_engine(BACKEND, make(13, tasks=("i2v",)), "tiny.i2v") as engine:
        made = run(engine, inputs_of(case))["velocity"]
    torch.testing.assert_close(made, case["output_zero_pad"], rtol=0, atol=ATOL)


def test_the_originals_cache_and_what_comes_of_it(continuing, golden):
    case = golden("dit_tiny_vc_kvcache")
    with (
        open_engine(BACKEND, continuing, "tiny.vc.cache") as maker,
        open_engine(BACKEND, continuing, "tiny.vc", like=maker) as user,
    ):
        clean = case["cond_latents"].expand(2, -1, -1, -1, -1).contiguous()
        cached = run(maker, {"hidden_states": clean, "timestep": torch.zeros(2, 2)})
        for layer in range(3):
            for kind, letter in (("key", "k"), ("value", "v")):
                wanted = case[f"kv.{layer}.{letter}"].expand(2, -1, -1, -1)
                torch.testing.assert_close(cached[f"{kind}.{layer}"], wanted, rtol=0, atol=ATOL)
        made = run(user, {**inputs_of(case, latents="noise_latents"), **cached})["velocity"]
    torch.testing.assert_close(made, case["output"], rtol=0, atol=ATOL)


def test_a_second_engine_adds_no_weights(continuing):
    with (
        open_engine(BACKEND, continuing, "tiny.vc") as first,
        open_engine(BACKEND, continuing, "tiny.vc.cache", like=first) as second,
    ):
        assert isinstance(first, AotiEngine)
        assert isinstance(second, AotiEngine)
        assert first.shared_weights.tensors
        assert second.shared_weights is first.shared_weights


def test_the_weights_are_the_bundles_file_itself(bundle):
    weights = str(bundle.path("dit.safetensors"))
    with open_engine(BACKEND, bundle, "tiny") as engine:
        assert isinstance(engine, AotiEngine)
        mapped = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(weights)
        ]
        for tensor in engine.shared_weights.tensors.values():
            assert any(start <= tensor.data_ptr() < end for start, end in mapped)


def test_other_weights_are_not_shared(bundle, continuing):
    changed = continuing.manifest.files["dit.safetensors"].model_copy(update={"sha256": "0" * 64})
    files = {**continuing.manifest.files, "dit.safetensors": changed}
    other = Bundle(continuing.folder, continuing.manifest.model_copy(update={"files": files}))
    with (
        open_engine(BACKEND, bundle, "tiny") as first,
        open_engine(BACKEND, other, "tiny.vc.cache", like=first) as second,
    ):
        assert isinstance(first, AotiEngine)
        assert isinstance(second, AotiEngine)
        assert second.shared_weights is not first.shared_weights


def test_a_process_that_runs_packages_has_no_model_code(bundle):
    code = """
import json, sys, torch
from lcexport.engines import open_engine
from lcexport.engines.bundle import (open_bundle)
with open_engine("aotinductor", open_bundle(sys.argv[1]), "tiny") as engine:
    make = lambda specs: {s.name: torch.ones(s.shape, dtype=s.dtype) for s in specs}
    outputs = make(engine.outputs)
    engine.run(make(engine.inputs), outputs)
finite = bool(outputs["velocity"].isfinite().all())
print(json.dumps([finite, sorted(sys.modules)]))
"""
    words = [sys.executable, "-c", code, str(bundle.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    finite, modules = json.loads(done.stdout)
    assert finite
    assert "lcexport.engines.aoti" in modules
    forbidden = ("lcexport.dit", "lcexport.graph", "lcexport.checkpoint", "torch._inductor", "onnx")
    assert not [name for name in modules if name.startswith(forbidden)]


def test_a_modified_package_is_refused_before_it_is_loaded(copied, monkeypatch):
    (package,) = copied.glob("engines/*/*/block.pt2")
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    loaded = []

    def load(path: str, *_):
        loaded.append(Path(path).name)

    monkeypatch.setattr(aoti, "AOTIModelPackageLoader", load)
    with pytest.raises(IntegrityError, match=r"block\.pt2.*SHA-256"):
        open_bundle(copied)
    unchecked = Bundle(copied, read_manifest(copied))
    with pytest.raises(IntegrityError, match=r"block\.pt2 is not the plan.*Do not load it"):
        open_engine(BACKEND, unchecked, "tiny")
    assert loaded == ["embed.pt2"]  # the one before it, which is whole


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("version", "2.12.0", "another torch; got torch .*; wanted torch 2.12.0"),
        ("platform", "linux-riscv64", "another platform.*wanted platform linux-riscv64"),
        ("device", "cuda", "another device; got device cpu; wanted device cuda"),
        ("cpu_features", ["avx1024"], "another instruction set.*wanted .*avx1024"),
    ],
)
def test_packages_for_something_else_are_refused(bundle, field, value, match, monkeypatch):
    engine = bundle.manifest.engines[BACKEND]["tiny"]
    if field in engine.options:
        changed = engine.model_copy(update={"options": {**engine.options, field: value}})
    else:
        changed = engine.model_copy(update={field: value})
    manifest = bundle.manifest.model_copy(update={"engines": {BACKEND: {"tiny": changed}}})
    monkeypatch.setattr(aoti, "load_package", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(IncompatibleError, match=match) as caught:
        open_engine(BACKEND, Bundle(bundle.folder, manifest), "tiny")
    assert "lcexport build" in str(caught.value.do)
    assert "--backend aotinductor --device cpu" in str(caught.value.do)
    assert "--weights" not in str(caught.value.do)


def test_what_torch_does_not_load_is_said_with_what_to_do(copied):
    package = copied / "engines" / BACKEND / "tiny" / "final.pt2"
    package.write_bytes(b"not a package")
    manifest = read_manifest(copied)
    name = package.relative_to(copied).as_posix()
    files = {**manifest.files, name: file_record(package)}
    changed = manifest.model_copy(update={"files": files})
    (copied / MANIFEST).write_bytes(manifest_json(changed))
    with pytest.raises(IncompatibleError, match=r"cannot load .*final\.pt2.*lcexport build"):
        open_engine(BACKEND, open_bundle(copied), "tiny")


def test_tensors_that_do_not_fit_are_refused(bundle, golden):
    inputs = inputs_of(golden("dit_tiny_t2v"))
    with open_engine(BACKEND, bundle, "tiny") as engine:
        velocity = torch.empty(engine.outputs[0].shape)
        for name, wrong in (
            ("hidden_states", inputs["hidden_states"][:1]),
            ("timestep", inputs["timestep"].double()),
        ):
            with pytest.raises(UsageError, match=f"{name} does not fit"):
                engine.run({**inputs, name: wrong}, {"velocity": velocity})
        with pytest.raises(UsageError, match="velocity does not fit"):
            engine.run(inputs, {"velocity": velocity[:1]})


def test_a_closed_engine_runs_no_more(bundle, golden):
    engine = open_engine(BACKEND, bundle, "tiny")
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.run(inputs_of(golden("dit_tiny_t2v")), {})


def test_it_has_no_options_of_its_own(bundle):
    with pytest.raises(UsageError, match="aotinductor has no options"):
        open_engine(BACKEND, bundle, "tiny", options={"cuda_graph": True})


@pytest.fixture
def tf32_chosen():
    """A process that has chosen TF32; pytest's monkeypatch cannot put this attribute back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32_chosen")
def test_a_gpu_computes_the_originals_numbers(make, golden):
    case = golden("dit_tiny_t2v")
    given = make(9, device="cuda")
    with open_engine(BACKEND, given, "tiny", "cuda") as engine:
        inputs = {name: tensor.cuda() for name, tensor in inputs_of(case).items()}
        velocity = torch.empty(engine.outputs[0].shape, device="cuda")
        engine.run(inputs, {"velocity": velocity})
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.testing.assert_close(velocity.cpu(), case["output_zero_pad"], rtol=0, atol=1e-4)
