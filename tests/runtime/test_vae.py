"""Normalisation and decoding against the original VAE."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.runtime.vae import VideoDecoder, denormalize, normalize


@pytest.fixture(scope="module")
def decoder(vae_folder):
    return VideoDecoder(vae_folder)


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, ""), (torch.bfloat16, "_bf16")])
def test_normalisation_is_bit_equal(golden, dtype, suffix):
    case = golden("latent_norm")
    mean, std = golden("vae_tiny").meta["latents_mean"], golden("vae_tiny").meta["latents_std"]
    latents = case["latents"].to(dtype)
    assert torch.equal(normalize(latents, mean, std), case[f"normalized{suffix}"])
    assert torch.equal(denormalize(latents, mean, std), case[f"denormalized{suffix}"])


@pytest.mark.parametrize(("frames_T", "decoded"), [(3, "decoded"), (1, "image_decoded")])
def test_golden_decode(golden, decoder, frames_T, decoded):
    case = golden("vae_tiny")
    raw = case["latents"][:, :, :frames_T]
    frames = decoder.decode(normalize(raw, case.meta["latents_mean"], case.meta["latents_std"]))
    expected = (case[decoded] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert frames.shape == expected.shape
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, expected, rtol=0, atol=2e-5)


def test_the_end_of_the_original_pipeline(golden, decoder):
    case = golden("pipe_tiny_i2v")
    frames = decoder.decode(case["final"])
    torch.testing.assert_close(frames, case["video_np"].float(), rtol=0, atol=1e-3)


def test_a_batch_decodes_as_its_samples(golden, decoder):
    latents = torch.randn(2, 16, 2, 4, 6)
    both = decoder.decode(latents)
    assert both.shape == (2, 5, 32, 48, 3)
    assert torch.equal(both[1:], decoder.decode(latents[1:]))
    assert both.min() >= 0
    assert both.max() <= 1


def test_bfloat16_decodes_near_float32(vae_folder, decoder):
    latents = torch.randn(1, 16, 2, 4, 6)
    frames = VideoDecoder(vae_folder, torch.bfloat16).decode(latents)
    assert frames.dtype == torch.float32
    assert (frames - decoder.decode(latents)).abs().mean() < 0.02


def test_closing_twice_is_harmless(vae_folder):
    decoder = VideoDecoder(vae_folder).to("cpu")
    decoder.close()
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        decoder.decode(torch.zeros(1, 16, 1, 4, 6))


def test_frames_that_are_not_finite_are_refused(vae_folder):
    decoder = VideoDecoder(vae_folder)
    with pytest.raises(VerificationError, match=r"VAE left frames .* got 15360 of 15360 values"):
        decoder.decode(torch.full((1, 16, 2, 4, 4), torch.nan))


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_the_librarys_own_constants_are_not_used_in_silence(tmp_path, vae_folder, key):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(InputError, match=rf"vae/config\.json: no usable {key}"):
        VideoDecoder(tmp_path)


def test_weights_of_another_shape_are_one_error(tmp_path, vae_folder):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path) | {"decoder.conv_in.bias": torch.zeros(3)}
    path.unlink()
    save_file(weights, path)
    with pytest.raises(InputError, match=r"no usable VAE in .*vae; got RuntimeError.*Download"):
        VideoDecoder(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"vae/config\.json is missing"):
        VideoDecoder(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path, vae_folder):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()
    save_file({k: v for k, v in weights.items() if k != "decoder.conv_in.bias"}, path)
    with pytest.raises(InputError, match=r"lacks weights.*decoder\.conv_in\.bias"):
        VideoDecoder(tmp_path)
