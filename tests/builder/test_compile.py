"""Compiling a bundle's graphs with a real TensorRT compiler, which needs no GPU."""

import json
import shutil
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from lcexport.builder import BuildOptions, build, options_from
from lcexport.builder import compile as compiling
from lcexport.builder.staging import JOURNAL
from lcexport.configs.errors import BuildError, IncompatibleError, UsageError
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.ort import OrtEngine
from lcexport.engines.trt import probe
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import Product
from lcexport.verify import verify

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

BACKEND = "tensorrt-rtx"
SIZE = "64x96x9"


@pytest.fixture(scope="module")
def compiled_options(demo_options: BuildOptions, tmp_path_factory) -> BuildOptions:
    return demo_options.model_copy(
        update={
            "output": tmp_path_factory.mktemp("compiled") / "bundle",
            "precision": "bf16",
            "backends": (BACKEND,),
            "segments": 3,
            "ep_context": True,
            "only": "compile",
        }
    )


@pytest.fixture(scope="module")
def compiled(compiled_options: BuildOptions) -> Path:
    build(compiled_options)
    return compiled_options.output


def test_the_manifest_names_every_plan_and_its_blocks(compiled):
    manifest = open_bundle(compiled, every_hash=True).manifest
    engine = manifest.engines[BACKEND][SIZE]
    runs = [(plan.first_block, plan.last_block) for plan in engine.plans]
    assert runs == [(0, 1), (2, 2), (3, 3)]
    assert [plan.attentions for plan in engine.plans] == [4, 2, 2]
    assert [plan.file for plan in engine.plans] == [
        f"engines/{BACKEND}/{SIZE}/{index:02d}.plan" for index in range(3)
    ]
    assert all(manifest.files[plan.file].bytes > 1 << 20 for plan in engine.plans)
    assert engine.product == BACKEND
    assert engine.gpu is None
    assert not engine.verified


def test_what_leaves_a_plan_enters_the_next(compiled):
    first, second, third = open_bundle(compiled).manifest.engines[BACKEND][SIZE].plans
    names = [{tensor.name for tensor in plan.inputs} for plan in (first, second, third)]
    assert names[0] == {
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
    }
    shared = {"embed.text", "embed.time", "embed.cos", "embed.sin"}
    assert {tensor.name for tensor in first.outputs} == shared | {"blocks.1.x_next"}
    assert names[1] == shared | {"blocks.1.x_next"}
    assert [tensor.name for tensor in third.outputs] == ["velocity"]
    x = next(tensor for tensor in first.outputs if tensor.name == "blocks.1.x_next")
    assert x.dtype == "bfloat16"


def test_each_segment_is_a_stage_of_its_own(compiled):
    stages = [stage.name for stage in open_bundle(compiled).manifest.stages]
    compiling = [f"compile:{BACKEND}:{SIZE}:{index}/3" for index in (1, 2, 3)]
    assert stages[-4:] == [*compiling, f"context:{BACKEND}:{SIZE}"]


@pytest.fixture(scope="module")
def shared(compiled_options: BuildOptions, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("shared") / "bundle"
    build(
        compiled_options.model_copy(
            update={"output": output, "weights": "shared", "segments": 0, "ep_context": False}
        )
    )
    return output


def test_with_shared_weights_there_are_three_plans_whatever_the_depth(shared, compiled):
    manifest = open_bundle(shared, every_hash=True).manifest
    engine = manifest.engines[BACKEND][SIZE]
    assert [Path(plan.file).stem for plan in engine.plans] == ["embed", "block", "final"]
    assert [plan.attentions for plan in engine.plans] == [0, 2, 0]
    assert [call.plan for call in engine.calls] == [0, 1, 1, 1, 1, 2]
    assert engine.calls[2].prefix == "blocks.1."
    whole = open_bundle(compiled).manifest.graphs[SIZE].precision_proof
    attentions = [engine.plans[call.plan].attentions for call in engine.calls]
    assert sum(attentions) == whole["attentions_bulk"]


def test_a_shared_plan_holds_no_weight(shared, compiled):
    """The segments hold every weight once; the functions' plans hold code."""
    sizes = []
    for folder in (shared, compiled):
        manifest = open_bundle(folder).manifest
        plans = manifest.engines[BACKEND][SIZE].plans
        sizes.append(sum(manifest.files[plan.file].bytes for plan in plans))
        weights = manifest.files["dit.safetensors"].bytes
    assert sizes[1] > weights
    assert sizes[0] < sizes[1] - 0.9 * weights


@pytest.fixture(scope="module")
def every_task(compiled_options: BuildOptions, tmp_path_factory) -> Path:
    """The other tasks: continuation and refinement over shared weights, i2v with its own inside."""
    options = compiled_options.model_copy(
        update={
            "output": tmp_path_factory.mktemp("tasks") / "bundle", "tasks": ("vc", "refine"),
            "cond_frames": 5, "refine_size": (64, 128), "weights": "shared", "segments": 0,
            "ep_context": False,
        }
    )  # fmt: skip
    build(options)
    build(options.model_copy(update={"tasks": ("i2v",), "weights": "inside", "add": True}))
    return options.output


@pytest.mark.parametrize(
    ("task", "plans", "attentions"),
    [
        ("vc.cache", ["cacheembed", "cacheblock", "cachelast"], [0, 1, 0]),
        ("vc", ["embed", "block", "final"], [0, 2, 0]),
        ("refine", ["embed", "block", "final"], [0, 2, 0]),
        ("i2v", ["00"], [4 * 3]),  # per block: of the clean frame, of the others, of the text
    ],
)
def test_every_tasks_graph_compiles(every_task, task, plans, attentions):
    engine = open_bundle(every_task, every_hash=True).manifest.engines[BACKEND][f"{SIZE}.{task}"]
    assert [Path(plan.file).stem for plan in engine.plans] == plans
    assert [plan.attentions for plan in engine.plans] == attentions


def test_what_the_caches_plans_make_enters_the_continuations(every_task):
    engines = open_bundle(every_task).manifest.engines[BACKEND]
    made = {t.name: (t.shape, t.dtype) for t in engines[f"{SIZE}.vc.cache"].plans[1].outputs}
    used = {t.name: (t.shape, t.dtype) for t in engines[f"{SIZE}.vc"].plans[1].inputs}
    for name in ("key", "value"):
        assert made[name] == used[f"cached_{name}"]


def test_a_plan_is_not_run_where_there_is_no_gpu(compiled):
    for device in ("cpu", "cuda"):
        with pytest.raises(IncompatibleError, match="NVIDIA GPU"):
            open_engine(BACKEND, open_bundle(compiled), SIZE, device)


def test_the_plans_are_wrapped_for_onnx_runtime(compiled):
    manifest = open_bundle(compiled).manifest
    engine = manifest.engines[BACKEND][SIZE]
    assert engine.ep_context in manifest.files
    wrapped = ir.load(compiled / engine.ep_context)
    onnx.checker.check_model(ir.to_proto(wrapped), full_check=True)
    plans = [node.attributes.get_string("ep_cache_context") for node in wrapped.graph]
    assert plans == [plan.file for plan in engine.plans]
    assert all((compiled / plan).is_file() and plan in manifest.files for plan in plans)
    assert {(node.domain, node.op_type) for node in wrapped.graph} == {
        ("com.microsoft", "EPContext")
    }
    graph = ir.load(compiled / manifest.graphs[SIZE].file)
    for found, wanted in (
        (wrapped.graph.inputs, graph.graph.inputs),
        (wrapped.graph.outputs, graph.graph.outputs),
    ):
        assert [(v.name, v.shape, v.dtype) for v in found] == [
            (v.name, v.shape, v.dtype) for v in wanted
        ]


def test_wrapped_plans_are_refused_where_no_provider_takes_them(compiled):
    bundle = open_bundle(compiled)
    with pytest.raises(IncompatibleError, match=r"--device cuda"):
        open_engine(f"onnxruntime-{BACKEND}", bundle, SIZE)
    context = bundle.manifest.engines[BACKEND][SIZE].ep_context
    with pytest.raises(IncompatibleError, match=r"cannot open .*ctx\.onnx; got .*EPContext"):
        OrtEngine(compiled / context)


def test_a_changed_plan_fails_its_hash(compiled, tmp_path):
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    plan = copy / f"engines/{BACKEND}/{SIZE}/01.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    report = verify(copy, "hash")
    assert [check.name for check in report.failed] == [f"engines/{BACKEND}/{SIZE}/01.plan"]


def test_a_build_that_fails_in_a_segment_resumes_there(compiled_options, tmp_path, monkeypatch):
    real, asked = compiling.compile_graph, []

    def failing(*given, **named):
        asked.append(given[3].name)
        if asked == ["00.plan", "01.plan"]:
            raise BuildError("the compiler crashed")
        return real(*given, **named)

    monkeypatch.setattr(compiling, "compile_graph", failing)
    options = compiled_options.model_copy(update={"output": tmp_path / "b"})
    with pytest.raises(BuildError, match="crashed"):
        build(options)
    assert not (tmp_path / "b").exists()
    journal = json.loads((tmp_path / "b.building" / JOURNAL).read_text("utf-8"))
    assert f"compile:{BACKEND}:{SIZE}:1/3" in journal["stages"]
    build(options.model_copy(update={"resume": True}))
    assert asked == ["00.plan", "01.plan", "01.plan", "02.plan"]
    open_bundle(tmp_path / "b", every_hash=True)


@pytest.mark.parametrize(("major", "target"), [(10, "tensorrt-10"), (11, "tensorrt-11")])
def test_the_rules_are_those_of_the_version(major, target):
    known = Product("tensorrt", None, (major, 14))  # pyright: ignore[reportArgumentType]
    assert compiling.target_of(known) == target


def test_a_tensorrt_whose_rules_are_not_known_is_refused_first(compiled_options, monkeypatch):
    newer = Product("tensorrt", None, (12, 0, 1))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(compiling, "open_product", lambda name: newer)
    wanted = r"no rules .*; got tensorrt 12\.0\.1; wanted tensorrt-10 or tensorrt-11\. .*<12"
    with pytest.raises(IncompatibleError, match=wanted):
        compiling.require_compiler("tensorrt", compiled_options)


def test_fp32_is_refused_before_anything_is_built(compiled_options, tmp_path):
    options = compiled_options.model_copy(
        update={"output": tmp_path / "b", "precision": "fp32", "islands": "checkpoint"}
    )
    with pytest.raises(IncompatibleError, match="bf16"):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_running_wrapped_plans_needs_a_gpu_and_says_so_first(compiled_options, tmp_path):
    backends = (BACKEND, f"onnxruntime-{BACKEND}")
    options = compiled_options.model_copy(
        update={"output": tmp_path / "b", "backends": backends, "only": "all"}
    )
    with pytest.raises(IncompatibleError, match="NVIDIA GPUs; got device cpu"):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_an_rtx_target_that_does_not_exist_is_refused(compiled_options, tmp_path):
    options = compiled_options.model_copy(
        update={"output": tmp_path / "b", "trt": TrtOptions(compute_capabilities=("sm12",))}
    )
    with pytest.raises(UsageError, match="sm12"):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_crashes_here_is_refused_before_anything_is_built(
    compiled_options, tmp_path, monkeypatch
):
    monkeypatch.setattr(probe, "COMMAND", (sys.executable, "-c", "import os; os.abort()"))
    with pytest.raises(IncompatibleError, match=r"tensorrt-rtx crashed .*got SIGABRT"):
        build(compiled_options.model_copy(update={"output": tmp_path / "b"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weights": "shared", "segments": 2}, "shared weights have no segments"),
        ({"weights": "shared", "trt": {"refit": "true"}}, "shared weights have no refit"),
        ({"weights": "shared", "ep_context": True}, "shared weights have no EPContext model"),
        ({"backends": "onnxruntime", "segments": 2}, "need a TensorRT backend"),
        ({"trt": {"optimization_level": "6"}}, "--trt optimization_level: .*equal to 5; got '6'"),
        ({"trt": {"optimisation": "3"}}, "got 'optimisation'; wanted one of workspace_bytes"),
        ({"trt": {"refit": "perhaps"}}, "--trt refit: .*boolean.*got 'perhaps'"),
        ({"targets": "sm89,sm89"}, "--targets: .*named twice: sm89"),
        (
            {"trt": {"compute_capabilities": "sm89,sm89"}},
            "--trt compute_capabilities: .*named twice",
        ),
        ({"segments": -1}, "--segments: .*equal to 0; got -1"),
        ({"weights": "outside"}, "--weights: .*'inside' or 'shared'; got 'outside'"),
        ({"ep_context": "perhaps"}, "--ep-context: .*boolean"),
    ],
)
def test_options_that_contradict_are_refused(given, match):
    with pytest.raises(UsageError, match=match):
        options_from(**{"res": SIZE, "backends": BACKEND, "precision": "bf16", **given})


def test_tensorrts_options_come_from_words():
    words = {"optimization_level": "5", "weight_streaming": "on", "workspace_bytes": "1073741824"}
    options = options_from(
        res=SIZE, backends=BACKEND, precision="bf16", trt=words, targets="sm89, sm120"
    )
    assert options.trt == TrtOptions(
        optimization_level=5,
        weight_streaming=True,
        workspace_bytes=1 << 30,
        compute_capabilities=("sm89", "sm120"),
    )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"compute_capabilities": ("sm75",)}, "no bfloat16 on these GPUs; got sm75"),
        ({"refit": True}, "without a GPU .* Use --weights shared"),
    ],
)
def test_what_this_compiler_cannot_is_refused_before_anything_is_built(
    compiled_options, tmp_path, given, match
):
    options = compiled_options.model_copy(
        update={"output": tmp_path / "b", "trt": TrtOptions(**given), "ep_context": False}
    )
    with pytest.raises(IncompatibleError, match=match):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_more_segments_than_blocks_are_refused(compiled_options, tmp_path):
    options = compiled_options.model_copy(update={"output": tmp_path / "b", "segments": 5})
    with pytest.raises(UsageError, match=r"1\.\.4"):
        build(options)
    assert list(tmp_path.iterdir()) == []
