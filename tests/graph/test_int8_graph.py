"""Int8 weights in a graph: eager torch's numbers, integers to the end, and a proof that bites."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from lcexport.checkpoint import open_checkpoint, read_header, write_native
from lcexport.compare import difference
from lcexport.configs.errors import BuildError
from lcexport.dit import Geometry, LongCatDiT, dit_from_tensors, load_dit
from lcexport.engines.ort import OrtEngine
from lcexport.graph import GraphSpec, onnx_from_dit, prove_precision, save_graph
from lcexport.graph.check import check_graph
from lcexport.graph.int8 import inline_for_parser

DEPTH, MATRICES = 3, 2 + 3 * 11
FLOAT, BFLOAT16, INT8 = ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.INT8
BULK = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEOMETRY, TEXT = Geometry(2, 3, 4, 6), 10
Mutation = Callable[[ir.Function], None]


@pytest.fixture(scope="module")
def int8_graphs(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden DiT's graph with int8 weights, in both precisions."""
    checkpoint, paths = open_checkpoint(dit_folder), {}
    for bulk, dtype in BULK.items():
        folder = tmp_path_factory.mktemp(bulk)
        report = write_native(checkpoint, folder / "dit.safetensors", bulk=bulk, weights="int8")  # pyright: ignore[reportArgumentType]
        spec = GraphSpec(GEOMETRY, TEXT, dtype)
        paths[bulk] = folder / "dit.onnx"
        save_graph(onnx_from_dit(checkpoint.config, spec, report.tensors, "0"), paths[bulk])
    return paths


@pytest.fixture(scope="module")
def inputs(dit_folder: Path) -> dict[str, torch.Tensor]:
    config, generator = open_checkpoint(dit_folder).config, torch.Generator().manual_seed(5)
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(
            2, 1, TEXT, config.caption_channels, generator=generator
        ),
        "timestep": torch.full((2, 3), 752.0),
        "encoder_attention_mask": mask,
    }


def eager(path: Path, dit_folder: Path) -> LongCatDiT:
    config = open_checkpoint(dit_folder).config
    return dit_from_tensors(config, load_file(path.with_name("dit.safetensors")))


@pytest.mark.parametrize("form", ["as exported", "fused"])
def test_onnx_runtime_computes_what_eager_torch_does(int8_graphs, inputs, dit_folder, fuse, form):
    graph = fuse(int8_graphs["fp32"]) if form == "fused" else int8_graphs["fp32"]
    with torch.inference_mode():
        wanted = eager(int8_graphs["fp32"], dit_folder)(**inputs)
        floats = load_dit(dit_folder)(**inputs)
    got = torch.empty_like(wanted)
    with OrtEngine(graph) as engine:
        engine.run(inputs, {"velocity": got})
    assert difference(got, wanted).relative_l2 < 2e-5
    assert difference(wanted, floats).relative_l2 > 1e-3  # the integers are what is computed with


def test_eager_weights_are_integers_times_scales_rounded_once(int8_graphs, dit_folder):
    for bulk, path in int8_graphs.items():
        stored = load_file(path.with_name("dit.safetensors"))
        name = "blocks.1.ffn.w2.weight"
        scale = stored[f"{name}_scale"].numpy()[:, None]
        product = stored[f"{name}_int8"].numpy().astype(np.float32) * scale
        wanted = torch.from_numpy(product).to(BULK[bulk])
        found = eager(path, dit_folder).state_dict()
        assert found[name].dtype == BULK[bulk]
        assert torch.equal(found[name], wanted)
        island = found["blocks.1.adaln_linear_1.weight"]
        assert torch.equal(island, stored["blocks.1.adaln_linear_1.weight"])


def test_every_matrix_of_the_bulk_is_a_range_of_bytes_in_the_weights_file(int8_graphs):
    for path in int8_graphs.values():
        model, held = ir.load(path), read_header(path.with_name("dit.safetensors")).tensors
        assert path.stat().st_size < 200_000
        assert set(model.graph.initializers) == set(held)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            assert (tensor.offset, tensor.length) == (held[name].start, held[name].bytes)
        kinds = Counter(value.dtype for value in model.graph.initializers.values())
        assert kinds[INT8] == MATRICES


def test_onnx_runtime_folds_no_weight_into_a_float_copy(int8_graphs, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(int8_graphs["fp32"]), options, providers=["CPUExecutionProvider"])
    model = ir.load(tmp_path / "optimised.onnx")
    assert Counter(n.op_type for n in model.graph)["DequantizeLinear"] == MATRICES
    kinds = [v.dtype for v in model.graph.initializers.values() if v.shape and len(v.shape) == 2]
    assert kinds.count(INT8) == MATRICES
    islands = 2 + DEPTH + 2  # time embedder, adaLN, the final layer's two
    patches = 1
    assert kinds.count(FLOAT) <= islands + patches


@pytest.mark.parametrize("bulk", ["fp32", "bf16"])
def test_what_is_proved(int8_graphs, make_graph, bulk):
    proved = prove_precision(ir.load(int8_graphs[bulk]), BULK[bulk])
    floats = prove_precision(ir.load(make_graph(bulk)), BULK[bulk])
    assert proved == floats | {"weights_int8": MATRICES}


@pytest.mark.parametrize("target", ["tensorrt-10", "tensorrt-11", "tensorrt-rtx"])
def test_the_checker_knows_the_pattern(int8_graphs, target):
    assert check_graph(int8_graphs["bf16"], target) == []


def test_without_functions_it_is_the_same_graph(int8_graphs, inputs, tmp_path):
    model = inline_for_parser(ir.load(int8_graphs["fp32"]))
    assert not model.functions
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    path = int8_graphs["fp32"].with_name("inlined.onnx")
    save_graph(model, path)
    results = []
    for graph in (int8_graphs["fp32"], path):
        results.append(torch.empty(2, 16, 3, 8, 12))
        with OrtEngine(graph) as engine:
            engine.run(inputs, {"velocity": results[-1]})
    assert torch.equal(*results)


def test_a_float_graph_keeps_its_functions(make_graph):
    assert len(inline_for_parser(ir.load(make_graph())).functions) == 3


def test_a_weights_file_with_one_float_matrix_is_refused(int8_graphs, dit_folder):
    held = dict(read_header(int8_graphs["fp32"].with_name("dit.safetensors")).tensors)
    floats = load_file(dit_folder / "diffusion_pytorch_model.safetensors")
    assert "blocks.1.ffn.w1.weight" in floats
    held["blocks.1.ffn.w1.weight"] = held.pop("blocks.1.ffn.w1.weight_int8")
    config = open_checkpoint(dit_folder).config
    with pytest.raises(
        BuildError, match=r"does not fit the graph: blocks\.1\.ffn\.w1\.weight_int8"
    ):
        onnx_from_dit(config, GraphSpec(GEOMETRY, TEXT, torch.float32), held, "0")


# --- tampering: each changes one weight's path in the saved graph


def node_of(block: ir.Function, weight: str) -> ir.Node:
    return next(n for n in block if n.name == f"DequantizeLinear_{weight}")


def parameter(block: ir.Function, name: str) -> ir.Value:
    return next(value for value in block.inputs if value.name == name)


def after(block: ir.Function, node: ir.Node, kind: str, **attributes: int) -> None:
    """Put another operation between a node and what uses it."""
    uses = list(node.outputs[0].uses())
    new = ir.node(kind, [node.outputs[0]], attributes, name="new")
    new.outputs[0].name = "new_result"
    block.insert_after(node, new)
    for user, index in uses:
        user.replace_input_with(index, new.outputs[0])


def by_column(block: ir.Function) -> None:
    node_of(block, "self_attn.to_q.weight").attributes["axis"] = ir.AttrInt64("axis", 1)


def in_blocks(block: ir.Function) -> None:
    node = node_of(block, "self_attn.to_q.weight")
    node.attributes["block_size"] = ir.AttrInt64("block_size", 0)


def in_bfloat16(block: ir.Function) -> None:
    node = node_of(block, "self_attn.to_q.weight")
    node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(BFLOAT16))


def scale_in_bfloat16(block: ir.Function) -> None:
    node = node_of(block, "self_attn.to_q.weight")
    new = ir.node("Cast", [node.inputs[1]], {"to": int(BFLOAT16)}, name="low")
    new.outputs[0].name = "low_scale"
    block.insert_before(node, new)
    node.replace_input_with(1, new.outputs[0])


def scale_of_another_weight(block: ir.Function) -> None:
    one, other = (node_of(block, f"self_attn.{name}.weight") for name in ("to_q", "to_k"))
    first, second = one.inputs[1], other.inputs[1]
    one.replace_input_with(1, second)
    other.replace_input_with(1, first)


def rounded_on_the_way(block: ir.Function) -> None:
    after(block, node_of(block, "ffn.w1.weight"), "Cast", to=int(ir.DataType.FLOAT16))


def transposed(block: ir.Function) -> None:
    node = node_of(block, "self_attn.to_q.weight")
    after(block, node, "Transpose")


def used_twice(block: ir.Function) -> None:
    node = node_of(block, "self_attn.to_q.weight")
    user, _ = next(iter(node_of(block, "self_attn.to_k.weight").outputs[0].uses()))
    user.replace_input_with(0 if user.op_type == "Cast" else 1, node.outputs[0])


def one_weight_in_float(block: ir.Function) -> None:
    value = parameter(block, "self_attn.to_q.weight_int8")
    node = node_of(block, "self_attn.to_q.weight")
    new = ir.node("Cast", [value], {"to": int(FLOAT)}, name="plain")
    new.outputs[0].name = "plain_result"
    block.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(new.outputs[0])


TAMPERED: dict[str, tuple[Mutation, str]] = {
    "scales along the columns": (by_column, "integers times the scales|types contradict"),
    "blocks of a row": (in_blocks, "integers times the scales"),
    "multiplied in bfloat16": (in_bfloat16, "integers times the scales|types contradict"),
    "a rounded scale": (scale_in_bfloat16, "is not multiplied out alone|types contradict"),
    "another weight's scale": (scale_of_another_weight, "integers times the scales"),
    "another rounding": (rounded_on_the_way, "is not used as a weight|types contradict"),
    "transposed": (transposed, "is not used as a weight"),
    "one weight for two products": (used_twice, "is not used as a weight"),
    "not multiplied": (one_weight_in_float, "is not multiplied out alone"),
}


@pytest.mark.parametrize("bulk", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", TAMPERED)
def test_anything_looser_is_refused(int8_graphs, kind, bulk):
    model = ir.load(int8_graphs[bulk])
    change, message = TAMPERED[kind]
    change(model.functions["lcexport", "Block", ""])
    with pytest.raises(BuildError, match=message):
        prove_precision(model, BULK[bulk])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (by_column, "int8"),
        (in_blocks, "int8"),
        (in_bfloat16, "int8"),
        (one_weight_in_float, "type"),
    ],
)
def test_the_checker_names_what_is_not_the_pattern(int8_graphs, change, rule):
    model = ir.load(int8_graphs["bf16"])
    change(model.functions["lcexport", "Block", ""])
    found = check_graph(model, "tensorrt-rtx")
    assert rule in {violation.rule for violation in found}
    assert all(violation.function == "Block" for violation in found)
