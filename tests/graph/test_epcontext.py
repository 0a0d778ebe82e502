"""Plans wrapped for ONNX Runtime: one node each, chained by names, with what the providers read."""

from importlib import import_module

import onnx
import onnx_ir as ir
import pytest

from lcexport.configs.errors import BuildError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.engines import PROVIDERS
from lcexport.engines.manifest import EngineRecord, GraphRecord, PlanRecord, TensorRecord
from lcexport.graph.epcontext import wrap_plans


def tensor(name: str, dtype: str = "float32", shape: tuple[int, ...] = (2, 3)) -> TensorRecord:
    return TensorRecord(name=name, shape=shape, dtype=dtype)


LATENTS, MASK, VELOCITY = tensor("latents"), tensor("mask", "bool"), tensor("velocity")
X, TEXT = tensor("x", "bfloat16"), tensor("text", "bfloat16")


def plan(
    index: int, inputs: tuple[TensorRecord, ...], outputs: tuple[TensorRecord, ...], **changes
):
    fields = {"file": f"engines/{index:02d}.plan", "first_block": index, "last_block": index}
    return PlanRecord(
        **{**fields, "inputs": inputs, "outputs": outputs, "attentions": 2, **changes}
    )


TYPES = {"FLOAT": "tensor(float)", "BFLOAT16": "tensor(bfloat16)", "BOOL": "tensor(bool)"}
WHOLE = (plan(0, (LATENTS, MASK), (VELOCITY,)),)
CHAIN = (
    plan(0, (LATENTS, MASK), (TEXT, X)),
    plan(1, (X, TEXT), (tensor("y", "bfloat16"),)),
    plan(2, (tensor("y", "bfloat16"), TEXT), (VELOCITY,)),
)


def engine(plans: tuple[PlanRecord, ...], **changes) -> EngineRecord:
    return EngineRecord(
        plans=plans,
        product="tensorrt-rtx",
        version="1.7.1.116",
        platform="linux-x86_64",
        gpu=None,
        driver=None,
        verified=False,
        **{"compute_capabilities": ("sm89", "sm120"), "options": {}, **changes},
    )


@pytest.fixture
def graph() -> GraphRecord:
    return GraphRecord(
        file="dit.demo.onnx",
        job=jobs_for(preset_from("demo"), "t2v")[0],
        batch=1,
        inputs=(LATENTS, MASK),
        outputs=(VELOCITY,),
        precision_proof={},
    )


def attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


@pytest.mark.parametrize("backend", PROVIDERS)
def test_one_plan_is_one_node(graph, backend):
    model = wrap_plans(backend, engine(WHOLE), graph, "0")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "EPContext")
    assert attributes(node) == {
        "main_context": 1,
        "embed_mode": 0,
        "ep_cache_context": "engines/00.plan",
        "source": PROVIDERS[backend],
        "ep_sdk_version": "1.7.1.116",
        "hardware_architecture": "89,120",
        "partition_name": f"lcexport_{backend}_demo_00",
        "onnx_model_filename": "dit.demo.onnx",
    }
    assert [value.name for value in node.inputs if value] == ["latents", "mask"]


def test_segments_are_chained_by_their_names(graph):
    model = wrap_plans("tensorrt-rtx", engine(CHAIN), graph, "0")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    first, second, third = model.graph
    assert second.inputs == (first.outputs[1], first.outputs[0])
    assert third.inputs == (second.outputs[0], first.outputs[0])
    assert first.outputs[0].dtype == ir.DataType.BFLOAT16
    assert [(value.name, value.dtype) for value in model.graph.inputs] == [
        ("latents", ir.DataType.FLOAT),
        ("mask", ir.DataType.BOOL),
    ]
    assert list(model.graph.outputs) == list(third.outputs)
    assert len({attributes(node)["partition_name"] for node in model.graph}) == 3


def test_onnx_runtimes_own_schema_knows_every_attribute_and_type(graph):
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    known = state.get_all_operator_schema()
    (schema,) = [s for s in known if (s.domain, s.name) == ("com.microsoft", "EPContext")]
    allowed = {name for types in schema.type_constraints for name in types.allowed_type_strs}
    for node in wrap_plans("tensorrt-rtx", engine(CHAIN), graph, "0").graph:
        for name, attribute in node.attributes.items():
            assert schema.attributes[name].type.name == attribute.type.name
        names = {ir.DataType(value.dtype).name for value in (*node.inputs, *node.outputs) if value}
        assert {TYPES[name] for name in names} <= allowed


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"compute_capabilities": ("sm90",)}, "90"),
        ({"options": {"hardware_compatibility": "ampere_plus"}}, "80+"),
        ({"compute_capabilities": ()}, None),
    ],
)
def test_the_architecture_is_as_the_provider_compares_it(graph, changes, wanted):
    (node,) = wrap_plans("tensorrt", engine(WHOLE, **changes), graph, "0").graph
    assert attributes(node).get("hardware_architecture") == wanted


def test_tensorrts_provider_takes_one_plan_only(graph):
    with pytest.raises(UsageError, match=r"got 3 plans\. Build with --segments 1"):
        wrap_plans("tensorrt", engine(CHAIN), graph, "0")


@pytest.mark.parametrize("file", ["/engines/00.plan", "../00.plan", "engines/../../00.plan"])
def test_a_plan_outside_the_models_folder_is_refused(graph, file):
    plans = (WHOLE[0].model_copy(update={"file": file}),)
    with pytest.raises(BuildError, match="beside or below the model"):
        wrap_plans("tensorrt", engine(plans), graph, "0")


@pytest.mark.parametrize(
    ("plans", "match"),
    [
        (CHAIN[1:], r"01\.plan needs x, .*got nothing"),
        (CHAIN[:2], "the graph needs velocity, .*got nothing"),
        ((CHAIN[0], plan(1, (tensor("x"),), (VELOCITY,))), "needs x, .*BFLOAT16.*wanted float32"),
        (
            (CHAIN[0], plan(1, (tensor("x", "bfloat16", (3, 2)),), (VELOCITY,))),
            r"needs x, .*wanted bfloat16 \[3, 2\]",
        ),
    ],
)
def test_a_chain_with_a_gap_is_refused(graph, plans, match):
    with pytest.raises(BuildError, match=match):
        wrap_plans("tensorrt-rtx", engine(plans), graph, "0")
