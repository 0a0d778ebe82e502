"""The text encoder and the decoder as functions of one step: the library's numbers, bit for bit."""

import json
import shutil

import pytest
import torch

from lcexport.configs.components import text_encoder, vae_decoder
from lcexport.configs.errors import IncompatibleError
from lcexport.graph.components import FramePart, export_component
from lcexport.runtime.decoding import decoded_by_library
from lcexport.runtime.vae import VideoVAE

PIXELS = 32, 48


def test_two_functions_are_the_librarys_decoder_over_all_frames(demo_checkpoint):
    """The first latent frame's and the later ones', the second among them, whose past is short."""
    model = VideoVAE(demo_checkpoint)._opened()
    part = FramePart(model)
    z_116THW = torch.randn(1, 16, 5, 4, 6)
    with torch.no_grad():
        past: list[torch.Tensor] = []
        shapes = set()
        for t, wanted in enumerate(decoded_by_library(model, z_116THW)):
            pixels, *past = part(z_116THW[:, :, t : t + 1], *past)
            assert torch.equal(pixels, wanted)
            assert pixels.shape[2] == (4 if t else 1)
            shapes.add(tuple(tuple(kept.shape) for kept in past))
    assert len(shapes) == 1  # so one function serves the second frame and all after it
    assert {shape[2] for shape in shapes.pop()} == {2}


def test_a_later_frame_takes_what_the_one_before_kept(demo_checkpoint):
    size = vae_decoder(*PIXELS)
    first, later = (
        export_component(size, part, demo_checkpoint, torch.float32, "cpu", f"{part}.pt2").plan
        for part in size.parts
    )
    assert [tensor.name for tensor in first.inputs] == ["latents"]
    assert [tensor.shape for tensor in first.outputs[:1]] == [(1, 3, 1, *PIXELS)]
    assert [tensor.shape for tensor in later.outputs[:1]] == [(1, 3, 4, *PIXELS)]
    kept = [tensor.shape for tensor in later.inputs[1:]]
    assert kept == [tensor.shape for tensor in first.outputs[1:]]
    assert kept == [tensor.shape for tensor in later.outputs[1:]]
    assert first.weights == later.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_takes_the_weights_that_the_library_loads(demo_checkpoint, dtype):
    plan = export_component(
        vae_decoder(*PIXELS), "first", demo_checkpoint, dtype, "cpu", "first.pt2"
    ).plan
    loaded = dict(VideoVAE(demo_checkpoint, dtype)._opened().named_parameters())
    for tensor in plan.weights:
        weight = loaded[tensor.name]
        assert (tuple(weight.shape), str(weight.dtype)) == (tensor.shape, f"torch.{tensor.dtype}")
    decoder = {name for name in loaded if name.startswith(("decoder.", "post_quant_conv."))}
    assert {tensor.name for tensor in plan.weights} == decoder
    assert torch.get_default_dtype() == torch.float32


def test_the_text_encoders_length_is_the_programs(demo_checkpoint):
    size = text_encoder(24)
    plan = export_component(
        size, "encoder", demo_checkpoint, torch.float32, "cpu", "encoder.pt2"
    ).plan
    assert [(t.name, t.shape, t.dtype) for t in plan.inputs] == [
        ("ids", (1, 24), "int64"),
        ("mask", (1, 24), "bool"),
    ]
    assert plan.outputs[0].shape[:2] == (1, 24)


def test_a_decoder_that_makes_all_frames_at_once_is_refused(demo_checkpoint, tmp_path):
    shutil.copytree(demo_checkpoint / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 2}))
    with pytest.raises(IncompatibleError, match="patch_size 2"):
        export_component(vae_decoder(*PIXELS), "first", tmp_path, torch.float32, "cpu", "x.pt2")
