"""Normalisation, encoding and decoding against the original VAE."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.runtime.vae import VideoVAE, denormalize, normalize


@pytest.fixture(scope="module")
def vae(vae_folder):
    return VideoVAE(vae_folder)


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, ""), (torch.bfloat16, "_bf16")])
def test_normalisation_is_bit_equal(golden, dtype, suffix):
    case = golden("latent_norm")
    mean, std = golden("vae_tiny").meta["latents_mean"], golden("vae_tiny").meta["latents_std"]
    latents = case["latents"].to(dtype)
    assert torch.equal(normalize(latents, mean, std), case[f"normalized{suffix}"])
    assert torch.equal(denormalize(latents, mean, std), case[f"denormalized{suffix}"])


@pytest.mark.parametrize(("frames_T", "decoded"), [(3, "decoded"), (1, "image_decoded")])
def test_golden_decode(golden, vae, frames_T, decoded):
    case = golden("vae_tiny")
    raw = case["latents"][:, :, :frames_T]
    frames = vae.decode(normalize(raw, case.meta["latents_mean"], case.meta["latents_std"]))
    expected = (case[decoded] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert frames.shape == expected.shape
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, expected, rtol=0, atol=2e-5)


def test_the_end_of_the_original_pipeline(golden, vae):
    case = golden("pipe_tiny_i2v")
    frames = vae.decode(case["final"])
    torch.testing.assert_close(frames, case["video_np"].float(), rtol=0, atol=1e-3)


def test_a_batch_decodes_as_its_samples(golden, vae):
    latents = torch.randn(2, 16, 2, 4, 6)
    both = vae.decode(latents)
    assert both.shape == (2, 5, 32, 48, 3)
    assert torch.equal(both[1:], vae.decode(latents[1:]))
    assert both.min() >= 0
    assert both.max() <= 1


def test_frames_come_as_they_are_decoded_and_are_those_of_the_library(vae):
    latents = torch.randn(16, 3, 4, 6)
    groups = list(vae.frames(latents))
    assert [len(frames) for frames in groups] == [1, 4, 4]
    with torch.no_grad():
        raw = denormalize(
            latents[None], vae._model.config["latents_mean"], vae._model.config["latents_std"]
        )
        whole = vae._model.decode(raw, return_dict=False)[0]
    expected = whole.div(2).add(0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)
    assert torch.equal(torch.cat(groups), expected)


def test_two_videos_can_be_decoded_by_turns(vae):
    one, other = torch.randn(2, 16, 2, 4, 6)
    pairs = list(zip(vae.frames(one), vae.frames(other), strict=True))
    assert torch.equal(torch.cat([first for first, _ in pairs]), vae.decode(one[None])[0])
    assert torch.equal(torch.cat([second for _, second in pairs]), vae.decode(other[None])[0])


def test_the_caller_keeps_its_gradients_between_frames(vae):
    frames = vae.frames(torch.randn(16, 2, 4, 6))
    next(frames)
    assert torch.is_grad_enabled()


def test_earlier_frames_are_not_kept_while_later_ones_are_decoded(vae):
    alive = []
    for frames in vae.frames(torch.randn(16, 5, 4, 6)):
        alive.append(weakref.ref(frames.untyped_storage()))
        del frames
        assert sum(reference() is not None for reference in alive) <= 1
    assert len(alive) == 5


def test_tiles_are_blended_to_nearly_the_same_frames(vae_folder, vae):
    latents = torch.randn(1, 16, 2, 40, 6)
    tiled = VideoVAE(vae_folder, tiling=True)
    assert [len(frames) for frames in tiled.frames(latents[0])] == [5]
    frames, whole = tiled.decode(latents), vae.decode(latents)
    assert frames.shape == whole.shape
    assert not torch.equal(frames, whole)
    assert (frames - whole).abs().mean() < 0.05


def test_bfloat16_decodes_near_float32(vae_folder, vae):
    latents = torch.randn(1, 16, 2, 4, 6)
    frames = VideoVAE(vae_folder, torch.bfloat16).decode(latents)
    assert frames.dtype == torch.float32
    assert (frames - vae.decode(latents)).abs().mean() < 0.02


def test_closing_twice_is_harmless(vae_folder):
    vae = VideoVAE(vae_folder).to("cpu")
    vae.close()
    vae.close()
    with pytest.raises(UsageError, match="closed"):
        vae.decode(torch.zeros(1, 16, 1, 4, 6))


def test_frames_that_are_not_finite_are_refused(vae_folder):
    vae = VideoVAE(vae_folder)
    with pytest.raises(VerificationError, match=r"VAE left frames .* got 3072 of 3072 values"):
        vae.decode(torch.full((1, 16, 2, 4, 4), torch.nan))


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_the_librarys_own_constants_are_not_used_in_silence(tmp_path, vae_folder, key):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(InputError, match=rf"vae/config\.json: no usable {key}"):
        VideoVAE(tmp_path)


def test_weights_of_another_shape_are_one_error(tmp_path, vae_folder):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path) | {"decoder.conv_in.bias": torch.zeros(3)}
    path.unlink()
    save_file(weights, path)
    with pytest.raises(InputError, match=r"no usable VAE in .*vae; got RuntimeError.*Download"):
        VideoVAE(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"vae/config\.json is missing"):
        VideoVAE(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path, vae_folder):
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()
    save_file({k: v for k, v in weights.items() if k != "decoder.conv_in.bias"}, path)
    with pytest.raises(InputError, match=r"lacks weights.*decoder\.conv_in\.bias"):
        VideoVAE(tmp_path)


@pytest.mark.parametrize(("frames", "prefix"), [(9, "enc"), (1, "image_enc")])
def test_golden_encode(golden, vae, frames, prefix):
    case = golden("vae_tiny")
    mean, std = case.meta["latents_mean"], case.meta["latents_std"]
    pixels, noise = case["video"][:, :, :frames], torch.randn_like(case[f"{prefix}_mean"])
    latents = vae.encode(pixels, noise)
    expected = normalize(case[f"{prefix}_mean"] + case[f"{prefix}_std"] * noise, mean, std)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5)
    middle = vae.encode(pixels, torch.zeros_like(noise))
    torch.testing.assert_close(
        middle, normalize(case[f"{prefix}_mean"], mean, std), rtol=0, atol=2e-5
    )


def test_the_start_of_the_original_pipeline(golden, vae):
    # The original was given its initial noise, so the posterior's was the seed's first draw.
    case = golden("pipe_tiny_i2v")
    pixels = case["image_preprocessed"][:, :, None]
    latents = vae.encode(pixels, torch.Generator().manual_seed(11))
    torch.testing.assert_close(latents, case["latents_prepared"][:, :, :1], rtol=0, atol=1e-5)
    assert torch.equal(case["latents_init"][:, :, 1:], case["latents_prepared"][:, :, 1:])


def test_a_generator_draws_once_per_sample_in_the_vaes_dtype(vae_folder):
    vae = VideoVAE(vae_folder, torch.bfloat16)
    pixels = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(1, 16, 2, 2, 3, generator=generator, dtype=torch.bfloat16) for _ in "ab"]
    drawn = vae.encode(pixels, torch.Generator().manual_seed(3))
    given = vae.encode(pixels, torch.cat(noise))
    assert drawn.shape == (2, 16, 2, 2, 3)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, given)
    assert torch.equal(vae.encode(pixels[1:], noise[1]), given[1:])


def test_the_result_is_normalised_in_the_dtype_asked_for(golden, vae_folder):
    meta = golden("vae_tiny").meta
    vae = VideoVAE(vae_folder, torch.bfloat16)
    pixels, noise = torch.rand(1, 3, 1, 16, 24) * 2 - 1, torch.randn(1, 16, 1, 2, 3)
    wide, narrow = (vae.encode(pixels, noise, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    sample = denormalize(wide, meta["latents_mean"], meta["latents_std"]).bfloat16()
    assert torch.equal(narrow, normalize(sample, meta["latents_mean"], meta["latents_std"]))


def test_frames_after_the_last_whole_group_are_not_looked_at(vae):
    pixels, noise = torch.rand(1, 3, 8, 16, 24) * 2 - 1, torch.randn(1, 16, 2, 2, 3)
    latents = vae.encode(pixels, noise)
    assert torch.equal(latents, vae.encode(pixels[:, :, :5], noise))
    pixels[:, :, 4] = 0
    assert not torch.equal(latents, vae.encode(pixels, noise))


def test_noise_of_another_shape_is_refused(vae):
    with pytest.raises(UsageError, match=r"got \[1, 16, 2, 2, 3\]; wanted \[1, 16, 1, 2, 3\]"):
        vae.encode(torch.zeros(1, 3, 4, 16, 24), torch.zeros(1, 16, 2, 2, 3))


@pytest.mark.parametrize(
    "shape", [(3, 1, 16, 24), (1, 4, 1, 16, 24), (1, 3, 0, 16, 24), (1, 3, 1, 16, 20)]
)
def test_pixels_of_another_shape_are_refused(vae, shape):
    with pytest.raises(UsageError, match="multiples of 8"):
        vae.encode(torch.zeros(shape), torch.Generator())


def test_latents_that_are_not_finite_are_refused(vae):
    with pytest.raises(VerificationError, match=r"VAE left latents .* of 96 values"):
        vae.encode(torch.full((1, 3, 1, 16, 24), torch.nan), torch.Generator())
