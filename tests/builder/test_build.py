"""Builds: what a bundle holds, what an addition adds, and that a refused build leaves no trace."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.builder import BuildOptions, build, run
from lcexport.checkpoint import read_header, stream
from lcexport.configs.errors import BuildError, InputError, ResourceError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.host import peak_rss_bytes
from lcexport.engines.manifest import MANIFEST, WEIGHTS, read_manifest
from lcexport.golden import BRANCHES, read_golden, run_branch

SIZE, GRAPH, GOLDEN = "64x96x9", "dit.64x96x9.onnx", "golden/64x96x9.safetensors"
SHARD = "dit/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "dit/diffusion_pytorch_model.safetensors.index.json"
DEPTH = 4


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def checkpoint(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the demo checkpoint, to be damaged."""
    return shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_what_the_manifest_says(demo_bundle, demo_options):
    manifest = read_manifest(demo_bundle)
    assert (manifest.name, manifest.precision, manifest.islands) == ("bundle", "fp32", "checkpoint")
    assert manifest.backends == ("onnxruntime",)
    assert manifest.source.layout == "released, original names"
    assert (manifest.source.dtype, manifest.source.tensors) == ("F32", 21 * DEPTH + 14)
    assert {"lcexport", "torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    rebuilt = BuildOptions.model_validate({**manifest.effective, "output": demo_options.output})
    assert rebuilt == demo_options.model_copy(update={"model": rebuilt.model})
    assert demo_options.model
    assert rebuilt.model
    assert rebuilt.model.name == demo_options.model.name
    assert str(demo_options.model.parent) not in (demo_bundle / "manifest.json").read_text("utf-8")
    stages = ["weights", "components"]
    stages += [f"graph:{SIZE}", f"golden:{SIZE}", f"engine:onnxruntime:{SIZE}"]
    assert [stage.name for stage in manifest.stages] == stages
    assert all(0 < stage.peak_rss_bytes < 2 * peak_rss_bytes() for stage in manifest.stages)
    graph = manifest.graphs[SIZE]
    assert (graph.file, graph.golden, graph.batch) == (GRAPH, GOLDEN, 1)
    assert graph.fused == f"dit.{SIZE}.ort.onnx"
    assert graph.preset.latent_shape == (16, 3, 8, 12)
    assert graph.precision_proof["calls_of_block"] == DEPTH
    assert graph.precision_proof["products_bulk"] == 11 * DEPTH + 3


def test_every_file_is_in_the_manifest_with_its_digest(demo_bundle):
    found = digests(demo_bundle)
    del found[MANIFEST]
    manifest = read_manifest(demo_bundle)
    assert found == {name: record.sha256 for name, record in manifest.files.items()}
    assert {WEIGHTS, GRAPH, GOLDEN, "transformer/config.json", "vae/config.json"} <= set(found)
    for name, record in manifest.files.items():
        assert (demo_bundle / name).stat().st_size == record.bytes


def test_the_golden_branches_differ(demo_bundle):
    golden = read_golden(open_bundle(demo_bundle), SIZE)
    assert not torch.equal(golden["velocity_cond"], golden["velocity_uncond"])
    assert golden["mask_cond"].sum() > golden["mask_uncond"].sum() == 1
    assert all(torch.isfinite(golden[f"velocity_{branch}"]).all() for branch in BRANCHES)


def test_an_added_resolution_adds_a_graph_and_its_golden_data_only(demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    before, weights = digests(folder), (folder / WEIGHTS).stat()
    preset = preset_from("64x64x5")
    options = BuildOptions(output=folder, presets=(preset,), add=True)  # needs no checkpoint
    bundle = build(options)
    after = digests(folder)
    graphs = {"dit.64x64x5.onnx", "dit.64x64x5.ort.onnx"}
    assert set(after) - set(before) == graphs | {"golden/64x64x5.safetensors"}
    assert {name for name in before if after[name] != before[name]} == {MANIFEST}
    now = (folder / WEIGHTS).stat()
    assert (now.st_ino, now.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    assert list(bundle.manifest.graphs) == [SIZE, "64x64x5"]
    added = bundle.graph("64x64x5").added
    assert bundle.graph(SIZE).added is None
    assert added
    assert added.versions == bundle.manifest.versions
    assert added.effective["presets"] != bundle.manifest.effective["presets"]
    assert "model" not in added.effective
    assert added.device == "cpu"
    golden = read_golden(bundle, "64x64x5")
    with open_engine("eager", bundle, "64x64x5") as engine:  # of the bundle's own weights
        assert torch.equal(run_branch(engine, golden, "cond"), golden["velocity_cond"])
    open_bundle(folder, every_hash=True)
    with pytest.raises(UsageError, match="has 64x64x5 already"):
        build(options)
    other = options.model_copy(update={"precision": "bf16", "backends": ("eager",)})
    with pytest.raises(UsageError, match="another precision; got bf16; wanted fp32"):
        build(other)
    assert digests(folder) == after


def test_an_addition_that_fails_leaves_the_bundle_as_it_was(
    demo_bundle, demo_options, tmp_path, monkeypatch
):
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    before = digests(folder)
    made = shutil.copy(folder / GRAPH, tmp_path / "graph")

    def graph_stage(preset, options, target):
        shutil.copy(made, target / f"dit.{preset.name}.onnx")
        manifest = read_manifest(folder)
        record = manifest.graphs[SIZE].model_copy(
            update={"preset": preset, "file": f"dit.{preset.name}.onnx", "golden": None}
        )
        files = {record.file: manifest.files[GRAPH]}
        return run.StageOutput(files=files, facts={"graph": record.model_dump(mode="json")})

    def golden_stage(*given):
        raise BuildError("nothing golden today")

    monkeypatch.setattr(run, "graph_stage", graph_stage)
    monkeypatch.setattr(run, "golden_stage", golden_stage)
    preset = preset_from("64x64x5")
    with pytest.raises(BuildError, match="nothing golden"):
        build(demo_options.model_copy(update={"output": folder, "presets": (preset,), "add": True}))
    assert digests(folder) == before


def test_an_addition_whose_proof_fails_leaves_not_even_its_graph(
    demo_bundle, demo_options, tmp_path, monkeypatch
):
    def broken(*given, **named):
        raise BuildError("an island in bfloat16")

    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    (folder / "mine.txt").write_text("a user's own file", "utf-8")
    before = digests(folder)
    monkeypatch.setattr("lcexport.builder.stages.prove_precision", broken)
    added = {"output": folder, "presets": (preset_from("64x64x5"),), "add": True}
    with pytest.raises(BuildError, match="an island"):
        build(demo_options.model_copy(update=added))
    assert digests(folder) == before


def test_nan_in_a_component_stops_the_build_and_mended_it_is_resumed(
    demo_options, checkpoint, place
):
    path = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    sound = path.read_bytes()
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    path.unlink()
    save_file(tensors, path)
    changes = {"model": checkpoint, "output": place / "out", "only": "export"}
    options = demo_options.model_copy(update=changes)
    with pytest.raises(InputError, match=r"decoder\.conv_in\.bias' holds NaN"):
        build(options)
    assert [found.name for found in place.iterdir()] == ["out.building"]
    path.write_bytes(sound)
    build(options.model_copy(update={"resume": True}))
    assert [found.name for found in place.iterdir()] == ["out"]


def test_adding_to_nothing(demo_options, place):
    with pytest.raises(Exception, match="not a bundle"):
        build(demo_options.model_copy(update={"output": place / "out", "add": True}))
    assert list(place.iterdir()) == []


def test_a_bfloat16_bundle_for_eager_torch(demo_options, place):
    changes = {"output": place / "out", "precision": "bf16", "backends": ("eager",)}
    bundle = build(demo_options.model_copy(update=changes))
    infos = read_header(bundle.path(WEIGHTS)).tensors
    assert infos["blocks.0.ffn.w1.weight"].dtype == "BF16"
    assert infos["blocks.0.adaln_linear_1.weight"].dtype == "F32"
    assert bundle.graph(SIZE).precision_proof["island_exits"] == 6 * DEPTH + 1
    assert "onnxruntime" not in bundle.manifest.versions
    golden = read_golden(bundle, SIZE)
    with open_engine("eager", bundle, SIZE) as engine:
        assert torch.equal(run_branch(engine, golden, "cond"), golden["velocity_cond"])


def test_an_export_has_no_golden_data_and_needs_no_components(demo_options, checkpoint, place):
    shutil.rmtree(checkpoint / "vae")
    changes = {"model": checkpoint, "output": place / "out", "only": "export"}
    bundle = build(demo_options.model_copy(update=changes))
    assert bundle.manifest.backends == ()
    assert bundle.graph(SIZE).golden is None
    assert {WEIGHTS, GRAPH} <= set(bundle.manifest.files)
    assert not (bundle.folder / "golden").exists()
    with pytest.raises(InputError, match="no golden data"):
        read_golden(bundle, SIZE)


def missing_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder)


def missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.truncate((folder / SHARD).stat().st_size - 1)


def header_bomb(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    kept = {n: f for n, f in index["weight_map"].items() if not SHARD.endswith(f)}
    index["weight_map"] = kept | dict.fromkeys(tensors, Path(SHARD).name)
    del index["metadata"]
    (folder / INDEX).write_text(json.dumps(index))


def wrong_dtype(folder: Path) -> None:
    name = "final_layer.linear.bias"
    change_shard(folder, lambda tensors: tensors.update({name: tensors[name].double()}))


def wrong_shape(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors.update({"final_layer.linear.bias": torch.ones(3)}))


def extra_key(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors.update({"surprise": torch.ones(3)}))


def missing_key(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors.pop("final_layer.linear.bias"))


def nan_weight(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors["final_layer.linear.bias"][3].fill_(torch.nan))


def contradicting_config(folder: Path) -> None:
    config = json.loads((folder / "dit/config.json").read_text())
    (folder / "dit/config.json").write_text(json.dumps(config | {"depth": 48}))


def config_that_is_not_json(folder: Path) -> None:
    (folder / "dit/config.json").write_text("{")


def missing_component(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (missing_checkpoint, "checkpoint"),
        (missing_shard, "00002-of-00002"),
        (truncated_shard, "00002-of-00002"),
        (header_bomb, "00002-of-00002"),
        (wrong_dtype, r"final_layer\.linear\.bias \(F64, in .*00002-of-00002.*Download"),
        (wrong_shape, r"\(in .*00002-of-00002.*: got \[3\], wanted \[64\]\).*Download"),
        (extra_key, "surprise"),
        (missing_key, r"missing: final_layer\.linear\.bias"),
        (nan_weight, r"final_layer\.(linear|proj)\.bias"),
        (contradicting_config, "48 blocks, the weights hold 4"),
        (config_that_is_not_json, r"config\.json is not JSON"),
        (missing_component, "has no text_encoder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refused_checkpoint_leaves_no_trace(demo_options, checkpoint, place, damage, match):
    damage(checkpoint)
    options = demo_options.model_copy(update={"model": checkpoint, "output": place / "out"})
    with pytest.raises(InputError, match=match) as caught:
        build(options)
    assert caught.value.exit_code == 3
    assert list(place.iterdir()) == []


def test_a_component_that_links_to_nothing_is_not_left_out(demo_options, checkpoint, place):
    (checkpoint / "vae/config.json").unlink()
    (checkpoint / "vae/config.json").symlink_to(checkpoint / "nowhere")
    options = demo_options.model_copy(update={"model": checkpoint, "output": place / "out"})
    with pytest.raises(InputError, match=r"vae/config\.json is a link to nothing"):
        build(options)
    assert list(place.iterdir()) == []  # said before the first stage


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "holds no weights"),
        ("text_encoder/model.safetensors", "holds no weights"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("tokenizer/tokenizer.json", "no usable tokenizer"),
        ("tokenizer/tokenizer_config.json", "tokenizer"),
    ],
)
def test_a_component_that_lacks_a_file(demo_options, checkpoint, place, name, match):
    (checkpoint / name).unlink()
    options = demo_options.model_copy(update={"model": checkpoint, "output": place / "out"})
    with pytest.raises(InputError, match=match):
        build(options)
    assert list(place.iterdir()) == []


def test_a_component_that_is_truncated(demo_options, checkpoint, place):
    path = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    options = demo_options.model_copy(update={"model": checkpoint, "output": place / "out"})
    with pytest.raises(InputError, match="truncated"):
        build(options)
    assert list(place.iterdir()) == []


def test_the_islands_and_the_batch_asked_for_are_built(demo_options, place):
    shared = {"only": "export", "precision": "bf16"}
    for islands in ("checkpoint", "original"):
        output = place / islands
        build(demo_options.model_copy(update={**shared, "islands": islands, "output": output}))
    files = [load_file(place / islands / WEIGHTS) for islands in ("checkpoint", "original")]
    name = "final_layer.proj.weight"
    assert torch.equal(files[1][name], files[0][name].bfloat16().float())
    assert not torch.equal(files[1][name], files[0][name])
    build(demo_options.model_copy(update={**shared, "batch": 2, "output": place / "batch"}))
    graph = read_manifest(place / "batch").graphs[SIZE]
    assert graph.batch == 2
    assert {tensor.shape[0] for tensor in graph.inputs} == {2}


def test_an_output_that_is_not_empty_is_left_alone(demo_options, place):
    (place / "out").mkdir()
    (place / "out/mine").write_text("precious")
    (place / "file").write_text("precious")
    before = digests(place)
    for name, match in {"out": "not empty.*Name another with -o", "file": "is a file"}.items():
        with pytest.raises(ResourceError, match=match):
            build(demo_options.model_copy(update={"output": place / name}))
    assert digests(place) == before


@pytest.mark.parametrize("name", ["file/out", "file/below/out"])
def test_a_file_where_a_folder_should_be(demo_options, place, name):
    (place / "file").write_text("precious")
    with pytest.raises(ResourceError, match="a file is in the way"):
        build(demo_options.model_copy(update={"output": place / name}))
    assert digests(place).keys() == {"file"}


def test_a_folder_that_may_not_be_written(demo_options, mount_disk):
    disk = mount_disk("size=1g,ro")
    with pytest.raises(ResourceError, match="no permission to write"):
        build(demo_options.model_copy(update={"output": disk / "out"}))
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(demo_options, mount_disk):
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match=r"too full for this build; got 0\.00 GB free"):
        build(demo_options.model_copy(update={"output": disk / "out"}))
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_while_weights_are_written(demo_options, mount_disk, monkeypatch):
    monkeypatch.setattr(run, "refuse_shortage", lambda plan: None)
    monkeypatch.setattr(stream, "_check_space", lambda path, size: None)
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match=r"the disk is full: writing .*dit\.safetensors"):
        build(demo_options.model_copy(update={"output": disk / "out"}))
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_later_can_be_resumed(demo_options, mount_disk, monkeypatch):
    monkeypatch.setattr(run, "refuse_shortage", lambda plan: None)
    disk = mount_disk("size=21m")
    with pytest.raises(ResourceError, match="the disk is full"):
        build(demo_options.model_copy(update={"output": disk / "out"}))
    assert [path.name for path in disk.iterdir()] == ["out.building"]
    journal = json.loads((disk / "out.building/.journal.json").read_text())
    assert list(journal["stages"]) == ["weights"]
    assert not list(disk.rglob("*.partial"))


def test_an_engine_that_disagrees_fails_the_build(demo_bundle, demo_options):
    from lcexport.builder.stages import check_engine

    bundle = open_bundle(demo_bundle)
    golden = read_golden(bundle, SIZE)
    golden["velocity_uncond"] = golden["velocity_uncond"] * 1.001
    with (
        open_engine("onnxruntime", bundle, SIZE) as engine,
        pytest.raises(BuildError, match=r"onnxruntime engine disagrees .*\(velocity uncond\)"),
    ):
        check_engine(engine, golden, demo_options)
