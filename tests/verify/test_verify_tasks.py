"""Every task's graphs pass every level; a graph that is spoilt does not."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import preset_from
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import MANIFEST, read_manifest
from lcexport.verify import verify

TASKS = ("i2v", "vc", "vc-uncached", "refine-vc", "spatial-i2v")
GRAPHS = ("i2v", "vc.cache", "vc", "vc-uncached", "refine-vc", "spatial-i2v")


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("tasks") / "bundle"
    preset = preset_from("64x64x9").model_copy(update={"name": "tiny", "text_tokens": 32})
    build(
        BuildOptions(
            model=demo_checkpoint,
            output=output,
            presets=(preset,),
            tasks=TASKS,
            cond_frames=5,
            refine_size=(64, 64),
        )
    )
    return output


def test_every_graph_is_one_of_a_task(bundle):
    graphs = read_manifest(bundle).graphs
    assert tuple(graphs) == tuple(f"tiny.{name}" for name in GRAPHS)
    cached = graphs["tiny.vc"]
    made, used = graphs["tiny.vc.cache"].outputs, cached.inputs[4:]
    assert [(t.name, t.shape, t.dtype) for t in made] == [(t.name, t.shape, t.dtype) for t in used]


def test_every_level_passes(bundle):
    report = verify(bundle, "video")
    assert not report.failed
    rows = {(check.level, check.resolution) for check in report.checks if check.ok}
    for name in GRAPHS:
        levels = {level for level, graph in rows if graph == f"tiny.{name}"}
        assert levels >= {"load", "module", "step"}
        assert ("video" in levels) == (name != "vc.cache")


@pytest.mark.parametrize(
    ("graph", "tensor"), [("vc.cache", "value.0_cond"), ("vc", "velocity_cond")]
)
def test_another_output_is_found(bundle, tmp_path, graph, tensor):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    name = f"golden/tiny.{graph}.safetensors"
    golden = load_file(folder / name)
    golden[tensor] = golden[tensor].roll(1, dims=-1)
    save_file(golden, folder / name)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["files"][name] = {
        "bytes": (folder / name).stat().st_size,
        "sha256": sha256_of(folder / name),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    report = verify(folder, "step", resolutions=(f"tiny.{graph}",))
    wanted = tensor.replace("_", " ")
    assert wanted in {check.name for check in report.failed}
