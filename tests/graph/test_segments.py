"""Segments, run one after another, compute what the whole graph computes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from lcexport.configs.errors import BuildError, ResourceError, UsageError
from lcexport.graph import save_graph
from lcexport.graph.segments import Segment, propose_segments, segment_graph

DEPTH = 3
CARRIED = ("embed.text", "embed.time", "embed.cos", "embed.sin")
MAIN_INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")


def names(specs) -> set[str]:
    return {spec.name for spec in specs}


def calls(segment: Segment) -> list[str]:
    return [str(node.name) for node in segment.model.graph]


@pytest.fixture(scope="module")
def whole(make_graph) -> ir.Model:
    return ir.load(make_graph("bf16"))


@pytest.mark.parametrize(
    ("count", "blocks"), [(1, [(0, 2)]), (2, [(0, 1), (2, 2)]), (3, [(0, 0), (1, 1), (2, 2)])]
)
def test_blocks_are_spread_evenly_and_each_is_in_one_segment(whole, count, blocks):
    segments = segment_graph(whole, count)
    assert [(s.first_block, s.last_block) for s in segments] == blocks
    assert [s.index for s in segments] == list(range(count))
    assert [name for s in segments for name in calls(s)] == [node.name for node in whole.graph]


def test_what_crosses_the_borders(whole):
    first, middle, last = segment_graph(whole, 3)
    assert [spec.name for spec in first.inputs] == list(MAIN_INPUTS)
    assert names(first.outputs) == {*CARRIED, "blocks.0.x_next"}
    assert names(middle.inputs) == {*CARRIED, "blocks.0.x_next"}
    assert names(middle.outputs) == {"blocks.1.x_next"}
    assert names(last.inputs) == {*CARRIED, "blocks.1.x_next"}
    assert names(last.outputs) == {"velocity"}
    carried = {spec.name: spec for spec in middle.inputs}
    assert carried["blocks.0.x_next"].shape == (2 * 72, 256)
    assert carried["blocks.0.x_next"].dtype == ir.DataType.BFLOAT16
    assert carried["embed.time"].dtype == ir.DataType.FLOAT


def test_a_text_mask_is_carried_along(make_graph):
    first, last = segment_graph(ir.load(make_graph("bf16", zero_pad=False)), 2)
    assert "embed.text_mask" in names(first.outputs)
    assert "embed.text_mask" in names(last.inputs)


def test_each_weight_is_in_one_segment_at_its_place_in_the_file(whole):
    segments = segment_graph(whole, 3)
    held = [name for s in segments for name in s.model.graph.initializers]
    assert sorted(held) == sorted(whole.graph.initializers)
    for segment in segments:
        for name, value in segment.model.graph.initializers.items():
            tensor, original = value.const_value, whole.graph.initializers[name].const_value
            assert isinstance(tensor, ir.ExternalTensor)
            assert isinstance(original, ir.ExternalTensor)
            assert (tensor.location, tensor.offset, tensor.length) == (
                original.location,
                original.offset,
                original.length,
            )
    total = sum(value.const_value.nbytes for value in whole.graph.initializers.values())  # pyright: ignore[reportOptionalMemberAccess]
    assert sum(s.weights_bytes for s in segments) == total


def test_segments_hold_the_functions_they_call_and_the_original_is_untouched(whole):
    before = ir.to_proto(whole).SerializeToString(deterministic=True)
    segments = segment_graph(whole, 3)
    held = [[f.name for f in s.model.functions.values()] for s in segments]
    assert held == [["Embed", "Block"], ["Block"], ["Block", "Final"]]
    for segment in segments:
        next(iter(segment.model.functions.values()))[-1].name = "changed"
    assert ir.to_proto(whole).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("count", [-1, 0, DEPTH + 1])
def test_numbers_that_cannot_be(whole, count):
    with pytest.raises(UsageError, match=r"out of range; got -?\d; wanted 1\.\.3"):
        segment_graph(whole, count)


def test_a_segment_cannot_be_cut_again(whole):
    with pytest.raises(BuildError, match="only a whole graph"):
        segment_graph(segment_graph(whole, 3)[1].model, 1)


def write(segments: list[Segment], beside: Path, tag: str) -> list[Path]:
    paths = [beside.with_name(f"{beside.stem}.{tag}{s.index}.onnx") for s in segments]
    for segment, path in zip(segments, paths, strict=True):
        save_graph(segment.model, path)
        onnx.checker.check_model(path, full_check=True)
    return paths


def chain(runners, segments: list[Segment], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run the segments in order; each sees only what its description says it needs."""
    values = dict(inputs)
    for runner, segment in zip(runners, segments, strict=True):
        fed = {spec.name: values[spec.name] for spec in segment.inputs}
        results = runner.run([spec.name for spec in segment.outputs], fed)
        values.update(zip((s.name for s in segment.outputs), results, strict=True))
    return values["velocity"]


def graph_inputs(golden) -> dict[str, np.ndarray]:
    case = golden("dit_tiny_t2v")
    return {
        "hidden_states": case["hidden_states"].numpy(),
        "encoder_hidden_states": case["encoder_hidden_states"].numpy(),
        "timestep": case["timestep"][:, None].expand(-1, 3).contiguous().numpy(),
        "encoder_attention_mask": case["encoder_attention_mask"].bool().numpy(),
    }


@pytest.mark.parametrize("zero_pad", [True, False])
def test_in_onnx_runtime_the_chain_is_the_whole(golden, make_graph, zero_pad):
    path, inputs = make_graph(zero_pad=zero_pad), graph_inputs(golden)
    expected = np.asarray(onnxruntime.InferenceSession(path).run(None, inputs)[0])
    for count in (2, 3):
        segments = segment_graph(ir.load(path), count)
        runners = [onnxruntime.InferenceSession(p) for p in write(segments, path, f"n{count}-")]
        np.testing.assert_allclose(chain(runners, segments, inputs), expected, rtol=0, atol=1e-6)


def test_in_bfloat16_the_chain_is_the_whole_bit_for_bit(golden, make_graph):
    path, inputs = make_graph("bf16"), graph_inputs(golden)
    expected = np.asarray(ReferenceEvaluator(onnx.load(path)).run(None, inputs)[0])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    segments = segment_graph(ir.load(path), 3)
    runners = [ReferenceEvaluator(onnx.load(p)) for p in write(segments, path, "n3-")]
    assert np.array_equal(chain(runners, segments, inputs), expected)


def test_the_proposed_number_is_the_smallest_that_fits():
    block, gib = 560_000_000, 1 << 30
    proposed = [propose_segments(block, 48, memory * gib) for memory in (200, 64, 24, 16, 8, 4)]
    assert proposed[0] == 1
    assert all(fewer <= more for fewer, more in pairwise(proposed))
    for memory, count in zip((200, 64, 24, 16, 8, 4), proposed, strict=True):
        blocks = -(-48 // count)
        assert 3 * block * blocks + gib // 2 < memory * gib
    with pytest.raises(ResourceError, match="does not hold the build of one block"):
        propose_segments(block, 48, gib)
