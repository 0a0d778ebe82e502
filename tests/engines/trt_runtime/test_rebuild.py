"""The command that an error gives is one that lcexport takes, and builds the same kind of plans."""

import pytest

from lcexport.engines.manifest import CallRecord, EngineRecord, Manifest, PlanRecord, read_manifest
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.rebuild import rebuild_command

SIZE = "64x96x9"
PLAN = PlanRecord(file="0.plan", first_block=0, last_block=1, inputs=(), outputs=(), attentions=2)


@pytest.fixture
def manifest_of(demo_bundle):
    """`manifest_of("tensorrt", plans=2, refit=True)`: a bundle with such an engine."""

    def make(
        product: str, *, plans: int = 1, ep_context=None, batch: int = 1, shared=False,
        only: str = "all", islands: str = "checkpoint", **options,
    ) -> Manifest:  # fmt: skip
        manifest = read_manifest(demo_bundle)
        engine = EngineRecord(
            plans=(PLAN,) * plans,
            calls=(CallRecord(plan=0, prefix="", tensors={}),) * shared,
            product=product,
            version="11.4.0",
            platform="linux-x86_64",
            compute_capabilities=options.get("compute_capabilities", ()),
            gpu=None,
            driver=None,
            options=TrtOptions(**options).model_dump(mode="json", exclude={"timing_cache"}),
            verified=False,
            ep_context=ep_context,
        )
        graph = manifest.graphs[SIZE].model_copy(update={"batch": batch})
        return manifest.model_copy(
            update={
                "precision": "bf16",
                "islands": islands,
                "effective": {"only": only},
                "graphs": {SIZE: graph},
                "engines": {product: {SIZE: engine}},
            }
        )

    return make


def test_tensorrt_is_built_on_its_gpu_with_the_same_options(manifest_of, taken):
    wishes = {"refit": True, "hardware_compatibility": "ampere_plus", "workspace_bytes": 1 << 30}
    manifest = manifest_of("tensorrt", plans=3, batch=2, islands="original", **wishes)
    found = taken(rebuild_command(manifest, "tensorrt", SIZE, "sm90"))
    assert (found.device, found.precision, found.backends) == ("cuda", "bf16", ("tensorrt",))
    assert (found.segments, found.batch, found.islands) == (3, 2, "original")
    assert (found.weights, found.ep_context, found.only) == ("inside", False, "all")
    assert found.trt == TrtOptions(**wishes)
    assert [preset.name for preset in found.presets] == [SIZE]


def test_shared_weights_stay_shared(manifest_of, taken):
    manifest = manifest_of("tensorrt-rtx", plans=3, shared=True, only="compile")
    found = taken(rebuild_command(manifest, "tensorrt-rtx", SIZE, "sm89"))
    assert (found.weights, found.segments, found.only) == ("shared", 0, "compile")
    assert found.trt == TrtOptions()  # no targets were named: all of the product's


def test_the_gpu_at_hand_is_among_the_targets(manifest_of, taken):
    manifest = manifest_of("tensorrt-rtx", compute_capabilities=("sm86", "sm89"))
    found = taken(rebuild_command(manifest, "tensorrt-rtx", SIZE, "sm120"))
    assert found.trt.compute_capabilities == ("sm86", "sm89", "sm120")
    found = taken(rebuild_command(manifest, "tensorrt-rtx", SIZE, "sm89"))
    assert found.trt.compute_capabilities == ("sm86", "sm89")


@pytest.mark.parametrize(("product", "segments"), [("tensorrt", 1), ("tensorrt-rtx", 2)])
def test_plans_are_wrapped_again(manifest_of, taken, product, segments):
    manifest = manifest_of(product, plans=segments, ep_context="dit.ctx.onnx")
    found = taken(rebuild_command(manifest, product, SIZE))
    assert (found.ep_context, found.segments) == (True, segments)


@pytest.mark.parametrize("product", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("shared", [False, True])
def test_plans_that_cannot_be_wrapped_are_built_so_that_they_can(
    manifest_of, taken, product, shared
):
    wishes = {} if shared else {"strip_plan": True}
    manifest = manifest_of(product, plans=2, shared=shared, **wishes)
    backend = f"onnxruntime-{product}"
    found = taken(rebuild_command(manifest, product, SIZE, wrapped_for=backend))
    assert found.backends == (product, backend)
    assert (found.ep_context, found.weights, found.trt) == (True, "inside", TrtOptions())
    assert product != "tensorrt" or found.segments == 1
