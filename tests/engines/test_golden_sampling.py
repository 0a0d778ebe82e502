"""A whole sampling of six steps, step by step, against the original pipeline's."""

import pytest
import torch

from lcexport.dit import LongCatDiT, load_dit
from lcexport.engines import TensorSpec
from lcexport.engines.eager import EagerEngine
from lcexport.engines.ort import OrtEngine
from lcexport.runtime import StepEvent
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.sampler import sample
from lcexport.runtime.schedule import schedule
from lcexport.runtime.text import Text

ATOL = 1e-4  # float32, several steps


def eager_engine(dit: LongCatDiT, batch: int) -> EagerEngine:
    inputs = (
        TensorSpec("hidden_states", (batch, 16, 3, 8, 12), torch.float32),
        TensorSpec("encoder_hidden_states", (batch, 1, 12, 64), torch.float32),
        TensorSpec("timestep", (batch, 3), torch.float32),
        TensorSpec("encoder_attention_mask", (batch, 12), torch.bool),
    )
    output = TensorSpec("velocity", (batch, 16, 3, 8, 12), torch.float32)
    return EagerEngine(lambda given: [dit(**given)], inputs, (output,), torch.device("cpu"))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_every_step_is_the_originals(golden, dit_folder, make_graph, fuse, backend, batch):
    case = golden("denoise_tiny")
    if backend == "eager":
        engine = eager_engine(load_dit(dit_folder), batch)
    else:
        engine = OrtEngine(fuse(make_graph(batch=batch, text_tokens=12)))
    negative, positive = (
        Text(case["prompt_embeds_cat"][row : row + 1], case["attention_mask_cat"][row : row + 1])
        for row in (0, 1)
    )
    steps = schedule(case.meta["args"]["num_inference_steps"], shift=case.meta["shift"])
    assert torch.equal(steps.sigmas, case["sigmas"])
    events: list[StepEvent] = []
    with engine:
        scale = case.meta["args"]["guidance_scale"]
        denoiser = Denoiser(engine, positive, negative, scale)
        latents = sample(denoiser.velocity, case["latents_init"], steps, events.append)
    assert len(events) == 6
    for event in events:
        wanted = case[f"latents_after_{event.step - 1}"]
        torch.testing.assert_close(event.latents, wanted, rtol=0, atol=ATOL)
    torch.testing.assert_close(latents, case["final"], rtol=0, atol=ATOL)
