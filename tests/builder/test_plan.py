"""The plan: numbers of the released model, and refusals before a byte is written."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from lcexport.builder import BuildOptions, build, default_output, make_plan, plan, refuse_shortage
from lcexport.builder.options import default_model, options_from
from lcexport.checkpoint import open_checkpoint
from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import ResourceError
from lcexport.configs.presets import preset_from
from lcexport.engines.manifest import WEIGHTS

RELEASED = DiTConfig(text_tokens_zero_pad=True)


@pytest.fixture
def options(demo_options, tmp_path) -> BuildOptions:
    return demo_options.model_copy(update={"output": tmp_path / "place" / "out"})


@pytest.fixture
def plenty(monkeypatch):
    """`plenty.disk` and `plenty.memory` are what the plan finds free, in bytes."""
    free = SimpleNamespace(disk=1 << 50, memory=1 << 50)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free.disk))
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: free.memory)
    return free


def test_the_released_model_at_480p(demo_checkpoint, options, plenty):
    checkpoint = replace(open_checkpoint(demo_checkpoint), config=RELEASED)
    changes = {"presets": (preset_from("480p"),), "precision": "bf16", "backends": ("eager",)}
    made = make_plan(checkpoint, options.model_copy(update=changes))
    assert made.weights_bytes == pytest.approx(28.4e9, rel=5e-3)
    (size,) = made.sizes
    assert size.tokens == 37_440
    assert size.latent_shape == (1, 16, 24, 60, 104)
    assert size.flops_per_forward == pytest.approx(1.967e15, rel=1e-3)
    assert size.flops_per_step == 2 * size.flops_per_forward
    assert size.attention_scores_bytes == 0
    assert made.build_memory_bytes > made.weights_bytes
    assert made.runtime_bytes["keep"] > made.runtime_bytes["cpu"] > made.weights_bytes
    refuse_shortage(made)


@pytest.mark.parametrize(
    ("asked", "copies"),
    [
        ({"backends": ("onnxruntime",)}, 3),
        ({"backends": ("eager",)}, 1),
        ({"backends": ("aotinductor",)}, 1),
        ({"backends": ("tensorrt-rtx",)}, 3),
        ({"backends": ("tensorrt-rtx",), "weights": "shared"}, 1),
        ({"backends": ("eager", "onnxruntime")}, 3),
    ],
)
def test_weights_are_counted_for_every_graph_that_holds_them(
    demo_checkpoint, options, plenty, asked, copies
):
    both = (preset_from("480p"), preset_from("720p"))  # the graphs of one are open at once
    asked = {
        "presets": both,
        "tasks": ("t2v", "vc"),
        "only": "export",
        "precision": "bf16",
        **asked,
    }
    checkpoint = replace(open_checkpoint(demo_checkpoint), config=RELEASED)
    made = make_plan(checkpoint, options.model_copy(update=asked))
    least = copies * made.weights_bytes
    rest = made.runtime_bytes["cpu"] - least
    largest = max(plan.step_bytes(size) for size in made.sizes)
    decoding = max(size.vae_decode_bytes for size in made.sizes)
    assert largest <= rest <= max(largest, decoding + made.components_bytes)


def test_float32_weights_take_twice_the_bulk():
    whole, half = (plan.weights_bytes(RELEASED, precision) for precision in ("fp32", "bf16"))
    assert whole == 4 * 13_581_071_424
    assert whole / 2 < half < whole


def test_a_new_bundle_needs_a_checkpoint_and_an_addition_none(options):
    given = {"output": options.output, "presets": options.presets}
    with pytest.raises(ValidationError, match="made of a checkpoint: name one with --model"):
        BuildOptions(**given)
    assert BuildOptions(**given, add=True).model is None
    assert options_from(res="64x64x5", output=options.output, add=True).model is None
    assert options_from(res="64x64x5", output=options.output).model == default_model()


def test_stages_follow_the_options(options):
    def names(options):
        return plan.stage_names(options, options.jobs(RELEASED))

    both = options.model_copy(
        update={
            "presets": (preset_from("64x96x9"), preset_from("64x64x5")),
            "backends": ("onnxruntime", "eager"),
        }
    )
    assert names(both) == [
        "weights",
        "components",
        "graph:64x96x9",
        "golden:64x96x9",
        "engine:onnxruntime:64x96x9",
        "engine:eager:64x96x9",
        "graph:64x64x5",
        "golden:64x64x5",
        "engine:onnxruntime:64x64x5",
        "engine:eager:64x64x5",
    ]
    wrapped = {"backends": ("tensorrt-rtx",), "ep_context": True, "only": "compile"}
    assert names(options.model_copy(update=wrapped)) == [
        "weights",
        "components",
        "graph:64x96x9",
        "compile:tensorrt-rtx:64x96x9",
        "context:tensorrt-rtx:64x96x9",
    ]
    only = both.model_copy(update={"only": "export", "add": True})
    assert names(only) == ["graph:64x96x9", "graph:64x64x5"]
    continued = options.model_copy(update={"tasks": ("vc",), "cond_frames": 5, "only": "export"})
    assert names(continued)[2:] == ["graph:64x96x9.vc.cache", "graph:64x96x9.vc"]


def test_the_weights_a_plan_foretells_are_those_a_build_writes(
    demo_bundle, demo_checkpoint, demo_options
):
    foretold = make_plan(open_checkpoint(demo_checkpoint), demo_options)
    written = sum(path.stat().st_size for path in demo_bundle.rglob("*") if path.is_file())
    header = (demo_bundle / WEIGHTS).stat().st_size - foretold.weights_bytes
    assert 0 < header < 1 << 20
    assert written < foretold.disk_needed_bytes < written + 4 * plan.GRAPH_BYTES


def test_a_full_disk_is_refused(options, plenty):
    plenty.disk = 20_000_000
    with pytest.raises(ResourceError, match=r"too full .*got 0\.02 GB free") as caught:
        build(options)
    assert caught.value.exit_code == 4
    assert not options.output.parent.exists()


def test_too_little_memory_is_refused(options, plenty):
    plenty.memory = 500 << 20
    with pytest.raises(ResourceError, match=r"memory will not do.*--only export") as caught:
        build(options)
    assert caught.value.exit_code == 4
    assert not options.output.parent.exists()


def test_an_export_needs_little_memory_whatever_the_model(demo_checkpoint, options, plenty):
    checkpoint = replace(open_checkpoint(demo_checkpoint), config=RELEASED)
    made = make_plan(checkpoint, options.model_copy(update={"only": "export"}))
    assert made.build_memory_bytes < 1e9
    assert made.disk_needed_bytes > made.weights_bytes > 54e9


@pytest.mark.parametrize(
    ("free_gb", "changes", "plans", "most_gb"),
    [
        (24, {}, 4, 23),  # a quarter of the weights at a time
        (100, {}, 1, 90),
        (24, {"segments": 8}, 8, 12),
        (24, {"weights": "shared"}, 3, 1),  # one plan for each function, whatever the depth
    ],
)
def test_tensorrt_is_cut_for_the_memory(
    demo_checkpoint, options, plenty, free_gb, changes, plans, most_gb
):
    plenty.memory = free_gb * 10**9
    checkpoint = replace(open_checkpoint(demo_checkpoint), config=RELEASED)
    asked = {"precision": "bf16", "only": "compile", "backends": ("tensorrt-rtx",), **changes}
    made = make_plan(checkpoint, options.model_copy(update=asked))
    assert made.plans_per_engine == plans
    assert made.build_memory_bytes < most_gb * 1e9
    inside = asked.get("weights") != "shared"
    assert (made.disk_needed_bytes > 2 * made.weights_bytes) is inside


def test_other_engines_have_no_plans(demo_checkpoint, options):
    assert make_plan(open_checkpoint(demo_checkpoint), options).plans_per_engine == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"islands": "original"}, "needs precision bf16"),
        ({"backends": ("onnxruntime", "none")}, "unknown backend; got 'none'"),
        ({"presets": ()}, "at least 1 item"),
        ({"presets": (preset_from("480p"), preset_from("480p"))}, "named twice"),
        ({"trt": {"compute_capabilities": ("sm89", "SM89")}}, "named twice: sm89, sm89"),
        ({"batch": 0}, "greater than or equal to 1"),
        ({"only": "engines"}, "'compile' or 'export'"),
        ({"surprise": 1}, "Extra inputs"),
        ({"ep_context": True}, "add --backend tensorrt or tensorrt-rtx"),
        (
            {"ep_context": True, "backends": ("tensorrt-rtx",), "trt": {"strip_plan": True}},
            "fill no stripped plan",
        ),
        ({"ep_context": True, "backends": ("tensorrt",)}, "runs one plan: add --segments 1"),
        (
            {"backends": ("tensorrt-rtx", "onnxruntime-tensorrt-rtx")},
            "add --ep-context and --backend tensorrt-rtx,onnxruntime-tensorrt-rtx",
        ),
        (
            {"ep_context": True, "backends": ("tensorrt-rtx", "onnxruntime-tensorrt")},
            "runs the plans of tensorrt: add",
        ),
    ],
)
def test_options_that_make_no_sense(options, changes, match):
    with pytest.raises(ValidationError, match=match):
        BuildOptions.model_validate({**options.model_dump(), **changes})


def test_default_names(tmp_path, monkeypatch):
    presets = (preset_from("480p"), preset_from("64x96x9"))
    name = default_output(tmp_path / "LongCat-Video", presets, "bf16")
    assert name.as_posix() == "bundles/LongCat-Video-480p+64x96x9-bf16"
    monkeypatch.setenv("LCEXPORT_MODEL", str(tmp_path))
    assert default_model() == tmp_path
    monkeypatch.delenv("LCEXPORT_MODEL")
    assert default_model().as_posix() == "weights/LongCat-Video"


def test_a_sparse_refinement_says_what_it_saves(options):
    sparse = RELEASED.model_copy(update={"bsa_params": BlockSparseParams()})
    asked = options.model_copy(update={"presets": (preset_from("480p"),), "tasks": ("refine",)})
    ((saving,), (dense,)) = (
        [plan.size_plan(config, job, asked) for job in asked.jobs(config)]
        for config in (sparse, RELEASED)
    )
    assert (saving.graph, saving.height, saving.width) == ("480p.refine", 704, 1280)
    assert saving.latent_shape == dense.latent_shape == (1, 16, 48, 88, 160)
    assert dense.flops_saved == 0
    share = 1 - saving.flops_per_step / dense.flops_per_step
    assert saving.flops_saved == pytest.approx(share)
    assert 0.7 < share < 0.9  # 15/16 of the scores of 168,960 tokens
