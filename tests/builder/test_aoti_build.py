"""Building packages with AOTInductor: one stage each, in a process of its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch._C._aoti import AOTIModelPackageLoader

from lcexport.builder import BuildOptions, aoti, build, make_plan, options_from
from lcexport.builder.plan import PACKAGE_BYTES, PARTS
from lcexport.builder.staging import JOURNAL
from lcexport.checkpoint import open_checkpoint, read_header
from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import BuildError, IncompatibleError, ResourceError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.doctor import diagnose
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.verify import verify

BACKEND = "aotinductor"
SIZE = "64x96x9"
# A compiler that takes no time: the package is what was asked for, as text.
DOUBLE = """
import json, os, pathlib, signal, sys
request = json.loads(sys.stdin.readline())
folder = pathlib.Path(request["folder"])
note = pathlib.Path({note!r})
with note.open("a") as file:
    file.write(request["part"] + chr(10))
if request["part"] == {victim!r}:
    {fate}
(folder / "package.pt2").write_text(request["part"])
report = {{"package": str(folder / "package.pt2"), "attentions": 0, "peak_rss_bytes": 1 << 40}}
print(json.dumps(["report", report]), flush=True)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
FAILED = (
    'print(json.dumps(["error", dict(type="BuildError", what="it fails", got=None, wanted=None, '
    "do=None)]), flush=True)"
)


@pytest.fixture
def double(monkeypatch, tmp_path):
    """`double("Final", KILLED)` is a compiler that ends so at that part; it notes what it did."""
    note = tmp_path / "compiled.txt"

    def make(victim: str = "", fate: str = "pass") -> Path:
        code = DOUBLE.format(note=str(note), victim=victim, fate=fate)
        monkeypatch.setattr(aoti, "COMMAND", (sys.executable, "-c", code))
        note.write_text("")
        return note

    return make


@pytest.fixture
def options(demo_options: BuildOptions, tmp_path) -> BuildOptions:
    update = {"output": tmp_path / "bundle", "backends": (BACKEND,), "only": "compile"}
    return demo_options.model_copy(update=update)


@pytest.fixture(scope="module")
def built(demo_options, build_packages, tmp_path_factory) -> Bundle:
    """A whole bundle of the demo checkpoint, compiled and run. Read only."""
    output = tmp_path_factory.mktemp("whole") / "bundle"
    update = {"output": output, "backends": (BACKEND,)}
    return open_bundle(build_packages(demo_options.model_copy(update=update)), every_hash=True)


def test_the_manifest_says_what_the_packages_are_for(built):
    engine = built.manifest.engines[BACKEND][SIZE]
    folder = f"engines/{BACKEND}/{SIZE}"
    assert [plan.file for plan in engine.plans] == [
        f"{folder}/{part}.pt2" for part in ("embed", "block", "final")
    ]
    assert [plan.attentions for plan in engine.plans] == [0, 2, 0]
    assert [call.plan for call in engine.calls] == [0, 1, 1, 1, 1, 2]
    assert [call.prefix for call in engine.calls[1:3]] == ["blocks.0.", "blocks.1."]
    assert (engine.product, engine.version) == (BACKEND, torch.__version__)
    assert engine.options["device"] == "cpu"
    assert engine.verified
    assert built.manifest.default_backend == BACKEND


def test_every_weight_is_handed_in_and_none_is_in_a_package(built):
    """Four blocks take one package, of code alone."""
    engine = built.manifest.engines[BACKEND][SIZE]
    taken = [
        call.prefix + tensor.name
        for call in engine.calls
        for tensor in engine.plans[call.plan].weights
    ]
    assert sorted(taken) == sorted(read_header(built.path("dit.safetensors")).tensors)
    for plan in engine.plans:
        loader = AOTIModelPackageLoader(str(built.path(plan.file)), "model", True, 1, -1)
        constants = loader.get_constant_fqns()
        assert all(name.startswith(("cos_", "sin_", "frequencies")) for name in constants)


def test_verify_holds_it_against_eager_torch(built):
    report = verify(built.folder, level="video")
    assert report.ok
    rows = {check.level for check in report.checks if check.backend == BACKEND and check.ok}
    assert rows == {"load", "step", "video"}


def test_a_killed_build_resumes_at_its_package(options, double):
    double("Final", KILLED)
    with pytest.raises(ResourceError, match=r"killed \(SIGKILL\).*1 to 2 GB"):
        build(options)
    unfinished = options.output.with_name("bundle.building")
    done = json.loads((unfinished / JOURNAL).read_bytes())["stages"]
    assert f"compile:{BACKEND}:{SIZE}:2/3" in done
    assert f"compile:{BACKEND}:{SIZE}:3/3" not in done
    places = unfinished / "engines" / BACKEND / SIZE
    assert sorted(path.name for path in places.iterdir()) == ["block.pt2", "embed.pt2"]
    (places / ".final.pt2.abc").mkdir()  # what a parent leaves that is killed with its child
    note = double()
    bundle = build(options.model_copy(update={"resume": True}))
    assert note.read_text().split() == ["Final"]
    assert sorted(path.name for path in (bundle.folder / "engines" / BACKEND / SIZE).iterdir()) == [
        "block.pt2", "embed.pt2", "final.pt2",
    ]  # fmt: skip
    (last,) = (s for s in bundle.manifest.stages if s.name.endswith(":3/3"))
    assert last.peak_rss_bytes == 1 << 40  # the compiler's, not this process's


def test_a_build_is_not_resumed_on_another_processor(options, double, monkeypatch):
    double("Final", KILLED)
    with pytest.raises(ResourceError, match="killed"):
        build(options)
    monkeypatch.setattr(aoti, "cpu_features", lambda: ("avx1024",))
    with pytest.raises(UsageError, match="started differently; got another machine"):
        build(options.model_copy(update={"resume": True}))


def test_packages_are_added_to_a_bundle_or_leave_nothing(options, double):
    double()
    build(options)
    added = options.model_copy(update={"add": True, "tasks": ("i2v",)})
    double("Block", FAILED)
    with pytest.raises(BuildError, match="it fails"):
        build(added)
    assert not (options.output / "engines" / BACKEND / f"{SIZE}.i2v").exists()
    open_bundle(options.output, every_hash=True)
    double()
    manifest = build(added).manifest
    assert set(manifest.engines[BACKEND]) == {SIZE, f"{SIZE}.i2v"}
    assert f"engines/{BACKEND}/{SIZE}.i2v/block.pt2" in manifest.files
    open_bundle(options.output, every_hash=True)


def test_the_real_compiler_leaves_its_package_and_nothing_else(built, options, tmp_path):
    """In a process of its own, as a build does it."""
    shutil.copytree(built.folder / "transformer", tmp_path / "transformer")
    graph = built.graph(SIZE)
    record = built.manifest.engines[BACKEND][SIZE].plans[2]
    made = aoti.compile_part(tmp_path, graph, "Final", record, options)
    place = tmp_path / "engines" / BACKEND / SIZE
    assert [path.name for path in place.iterdir()] == ["final.pt2"]
    assert made.files[record.file].bytes == (place / "final.pt2").stat().st_size > 100_000
    assert made.child_peak_rss_bytes > 100 << 20
    assert made.facts["plan"] == record.model_dump(mode="json")


def test_a_plan_names_its_stages_and_wants_room_for_code_alone(options):
    checkpoint = open_checkpoint(options.model)
    plans = [
        make_plan(checkpoint, options.model_copy(update={"backends": backends}))
        for backends in (("onnxruntime",), ("onnxruntime", BACKEND))
    ]
    assert [f"compile:{BACKEND}:{SIZE}" in plan.stages for plan in plans] == [False, True]
    assert plans[1].plans_per_engine == 0  # that is TensorRT's
    code = plans[1].disk_needed_bytes - plans[0].disk_needed_bytes
    assert code == PARTS * PACKAGE_BYTES


def test_without_a_compiler_it_is_said_how_to_get_one(options, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(IncompatibleError, match=r"no .*none on the PATH") as caught:
        build(options)
    assert "apt-get install g++" in str(caught.value.do)
    assert not options.output.exists()
    assert not options.output.with_name("bundle.building").exists()
    assert str(diagnose(BACKEND, "fp32").refusal) == str(caught.value)
    runs = [v.error for v in diagnose(BACKEND).verdicts if (v.action, v.device) == ("run", "cpu")]
    assert runs == [None, None]  # what is compiled runs without


@pytest.mark.parametrize(
    "asked",
    [
        {"targets": "sm89"},
        {"segments": 2},
        {"weights": "shared"},
        {"trt": {"refit": "true"}},
    ],
)
def test_what_only_tensorrt_has_is_refused(asked):
    with pytest.raises(UsageError, match="need a TensorRT backend"):
        options_from(backends=BACKEND, **asked)


def test_block_sparse_attention_is_refused_with_what_to_use_instead(options):
    sparse = {"tasks": ("refine",), "refine_size": (64, 128), "presets": (preset_from("64x96x13"),)}
    jobs = options.model_copy(update=sparse).jobs(DiTConfig(bsa_params=BlockSparseParams()))
    with pytest.raises(IncompatibleError, match=r"no block-sparse attention.*refine.*--dense"):
        aoti.require_packages(jobs)
