"""Graphs of the golden DiT compute what the original computes, as exported and fused."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lcexport.compare import difference
from lcexport.dit import load_dit
from lcexport.engines.ort import OrtEngine

ATOL = 2e-5


def engine_inputs(
    case, timestep: str = "timestep", mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The golden inputs as an engine wants them: one timestep a frame, a boolean mask."""
    latents, times = case["hidden_states"], case[timestep]
    if times.ndim == 1:
        times = times[:, None].expand(-1, latents.shape[2])
    return {
        "hidden_states": latents,
        "encoder_hidden_states": case["encoder_hidden_states"],
        "timestep": times.contiguous(),
        "encoder_attention_mask": case["encoder_attention_mask"].bool() if mask is None else mask,
    }


def run(graph, inputs: dict[str, Tensor]) -> Tensor:
    output = torch.full_like(inputs["hidden_states"], torch.nan)
    with OrtEngine(graph) as engine:
        engine.run(inputs, {"velocity": output})
    return output


@pytest.fixture(params=["as exported", "fused"])
def form(request, fuse):
    """`form(graph)` is the graph itself, or the one of fused operations."""
    return fuse if request.param == "fused" else lambda graph: graph


@pytest.mark.parametrize(("zero_pad", "name"), [(True, "zero_pad"), (False, "compact")])
def test_text_to_video(golden, make_graph, form, zero_pad, name):
    case = golden("dit_tiny_t2v")
    graph = form(make_graph(zero_pad=zero_pad))
    got = run(graph, engine_inputs(case))
    torch.testing.assert_close(got, case[f"output_{name}"], rtol=0, atol=ATOL)
    ones = torch.ones(case["encoder_attention_mask"].shape, dtype=torch.bool)
    got = run(graph, engine_inputs(case, mask=ones))
    torch.testing.assert_close(got, case["output_mask_none"], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("zero_pad", "timestep", "cond", "name"),
    [
        (False, "timestep", 1, "output_compact"),
        (True, "timestep_cond2", 2, "output_cond2_zero_pad"),
    ],
)
def test_conditioning_latents(golden, make_graph, form, zero_pad, timestep, cond, name):
    case = golden("dit_tiny_i2v")
    graph = form(make_graph(zero_pad=zero_pad, frames=4, cond=cond))
    got = run(graph, engine_inputs(case, timestep))
    torch.testing.assert_close(got, case[name], rtol=0, atol=ATOL)


def test_a_bfloat16_graph_rounds_as_eager_torch_does(golden, make_graph, dit_folder):
    """ONNX's own evaluator is the judge: ONNX Runtime has no bfloat16 on processors."""
    case = golden("dit_tiny_t2v")
    inputs = engine_inputs(case)
    evaluator = ReferenceEvaluator(onnx.load(make_graph("bf16")))
    outputs = list(evaluator.run(None, {name: value.numpy() for name, value in inputs.items()}))
    velocity = np.asarray(outputs[0])
    assert velocity.dtype == np.float32
    eager = load_dit(dit_folder, torch.bfloat16)(**inputs)
    assert difference(torch.from_numpy(velocity), eager).relative_l2 < 2e-2
