"""The toy's parts, untrained and for a few steps: what each is trained on, and what is written."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcexport.checkpoint import validate
from lcexport.configs.errors import UsageError
from lcexport.dit.model import LongCatDiT
from lcexport.lora.file import check_fits, check_values, read_lora
from lcexport.runtime.schedule import euler_step, schedule
from lcexport.runtime.text import TextEncoder
from tools.train_toy import __main__ as command
from tools.train_toy import dit, latents, lora, text, training, vae
from tools.train_toy.checkpoint import write_checkpoint
from tools.train_toy.training import Plan, Training, generator_at
from tools.train_toy.world import caption, render, scenes

CLIPS = 6
SMALL_STAGE = replace(vae.CLIPS, plan=replace(vae.CLIPS.plan, steps=4), crops=1, size=16, frames=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def reader(folder) -> text.TextReader:
    return text.train_text(folder, Plan(steps=2, rate=1e-3))


@pytest.fixture(scope="module")
def untrained_vae():
    made = vae.new_vae()
    vae.inflate(made)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def batches(folder, reader, untrained_vae) -> dit.Batches:
    encoded = latents.encode_clips(untrained_vae, folder, CLIPS)
    return dit.Batches(encoded, latents.statistics(encoded), reader)


@pytest.fixture
def small_batches(batches, monkeypatch) -> dit.Batches:
    monkeypatch.setattr(dit, "BATCH", 3)
    monkeypatch.setattr(lora, "BATCH", 3)
    return batches


def moved_dit() -> LongCatDiT:
    """One whose output is not zero any more."""
    model = dit.new_dit()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator_at(0))
    return model


def test_the_tokenizer_is_the_same_every_time_and_knows_every_word():
    one, other = text.train_tokenizer(), text.train_tokenizer()
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    words = caption(scenes(held=True)[0], generator_at(0)).split()
    assert one.tokenize(" ".join(words)) == [f"▁{word}" for word in words]
    assert "<unk>" not in one.tokenize("Zebra, 12")


def test_an_inflated_vae_sees_the_last_picture_of_each_four(untrained_vae):
    clip, _ = latents.clip_at(0)
    pixels = render([clip])
    whole = untrained_vae.encode(pixels, return_dict=False)[0].mean
    pictures = pixels[0, :, ::4].transpose(0, 1).unsqueeze(2)
    each = untrained_vae.encode(pictures, return_dict=False)[0].mean
    torch.testing.assert_close(whole, each.transpose(0, 2), rtol=1e-4, atol=1e-5)


def test_an_inflated_vae_repeats_each_picture(untrained_vae):
    z = torch.randn(1, 16, 2, 4, 4, generator=generator_at(0))
    frames = untrained_vae.decode(z, return_dict=False)[0]
    later = untrained_vae.decode(z[:, :, 1:], return_dict=False)[0]
    assert frames.shape[2] == 5
    for frame in range(1, 5):
        torch.testing.assert_close(frames[:, :, frame], later[:, :, 0], rtol=1e-4, atol=1e-5)


def test_latents_are_encoded_once(batches, folder, untrained_vae):
    before = (folder / "latents-00000.safetensors").stat().st_mtime_ns
    again = latents.encode_clips(untrained_vae, folder, CLIPS)
    assert (folder / "latents-00000.safetensors").stat().st_mtime_ns == before
    assert torch.equal(again, batches.latents)
    assert again.shape == (CLIPS, 16, 5, 8, 8)


def test_latents_of_another_number_of_clips_are_refused(batches, folder, untrained_vae):
    with pytest.raises(UsageError, match="of another training; got 6 clips; wanted 5 clips"):
        latents.encode_clips(untrained_vae, folder, CLIPS - 1)


@pytest.fixture(params=["text", "vae", "dit", "lora"])
def loss_at(request, small_batches, monkeypatch):
    """A part's loss of a step."""
    model = moved_dit()
    naming = text.Naming(small_batches.reader.encoder)
    monkeypatch.setattr(text, "BATCH", 3)
    return {
        "text": partial(text.loss_at, naming, small_batches.reader),
        "vae": partial(vae.loss_at, vae.new_vae(), SMALL_STAGE),
        "dit": partial(small_batches.loss_at, model),
        "lora": partial(lora.loss_at, lora.Lora(model), small_batches),
    }[request.param]


@torch.no_grad()
def test_what_a_step_is_trained_on_depends_on_its_number_alone(loss_at):
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append({name: float(value) for name, value in loss_at(3).items()})
    assert losses[0] == losses[1] != {name: float(value) for name, value in loss_at(4).items()}


def test_a_stopped_stage_of_the_vae_ends_at_the_same_weights(tmp_path, monkeypatch):
    def trained(folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        model = vae.new_vae()
        vae.train_stage(model, folder, SMALL_STAGE)
        return model.state_dict()

    def stopped(*given):
        if given[-1] == 2:
            raise KeyboardInterrupt
        return loss_at(*given)

    loss_at = vae.loss_at
    whole = trained(tmp_path / "whole")
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(vae, "loss_at", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts")
    parts = trained(tmp_path / "parts")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_crops_begin_at_the_edges_of_latents():
    places = torch.arange(64.0).expand(64, 64)
    video = torch.stack([places, places.T])
    crops = [vae.cropped(video, (31, 50), 32, generator_at(0, n)) for n in range(60)]
    assert {crop.shape for crop in crops} == {(2, 32, 32)}
    assert {float(crop[0, 0, 0]) for crop in crops} == {16, 24, 32}  # 50 - 16, and in the picture
    assert {float(crop[1, 0, 0]) for crop in crops} == {0, 8, 16, 24}


def test_pictures_are_frames_that_the_encoder_sees_of_clips(monkeypatch):
    lengths = set()

    def counted(clips, frames):
        lengths.add(frames)
        return render(clips, frames)

    monkeypatch.setattr(vae, "render", counted)
    vae.crops(60, 32, 1, generator_at(0))
    assert lengths == {1, 5, 9, 13, 17}


def test_latents_are_disturbed_by_their_own_measure():
    z = torch.randn(4, 2, 5, 32, 32, generator=generator_at(0))
    z[:, 1] *= 100
    noise = (vae.disturbed(z, 0.4, generator_at(1)) - z).std((2, 3, 4))
    assert noise.max() < 0.42 * 100
    torch.testing.assert_close(noise[:, 1], 100 * noise[:, 0], rtol=0.1, atol=0)
    assert noise[:, 0].max() > noise[:, 0].min() + 0.05


@torch.no_grad()
def test_the_decoder_is_trained_on_disturbed_latents():
    model = vae.new_vae()
    loss, still = (
        vae.loss_at(model, replace(SMALL_STAGE, noise=noise), 0)["squared"] for noise in (0.4, 0.0)
    )
    assert vae.CLIPS.noise == vae.WHOLE.noise == 0.4
    assert loss != still


def test_a_blocks_large_products_are_in_bfloat16_and_its_modulation_in_float32(small_batches):
    model = moved_dit()
    found = []

    def note(name, module, given, output):
        found.append((name, output.dtype))

    for name in ("adaln_linear_1", "self_attn.to_q", "cross_attn", "ffn"):
        model.layers[0].get_submodule(name).register_forward_hook(partial(note, name))
    small_batches.loss_at(model, 0)
    bulk = dict(found)
    assert bulk.pop("adaln_linear_1") is torch.float32
    assert list(bulk.values()) == 3 * [torch.bfloat16]


def test_the_samplers_noise_levels_are_the_schedules():
    uniform = torch.linspace(1, 0.001, 20)
    found = dit.shifted(uniform, dit.SAMPLING_SHIFT)
    torch.testing.assert_close(found, schedule(20).sigmas[:-1].float(), rtol=0, atol=1e-5)


def test_given_frames_are_trained_at_the_samplers_levels_in_the_end(small_batches, monkeypatch):
    shifts = []

    def shifted(uniform, shift):
        shifts.append(shift)
        return original(uniform, shift)

    original = dit.shifted
    monkeypatch.setattr(dit, "shifted", shifted)
    model = moved_dit()
    last = [step for step in range(dit.SAMPLED_FROM) if dit.CONDITIONED[step % 8]][-2:]
    first = [step + 8 for step in last]
    for step in (*last, *first, dit.SAMPLED_FROM):
        small_batches.loss_at(model, step)
    early, late = dit.TRAINING_SHIFT, dit.SAMPLING_SHIFT
    assert shifts == [early, early, late, late, early]  # the last one without given frames


def test_given_frames_are_clean_and_at_timestep_zero(batches):
    sigma = torch.tensor([0.25, 1.0])
    batch = batches.noised(sigma, 2, generator_at(0))
    clean = batches.noised(torch.zeros(2), 0, generator_at(0))
    assert torch.equal(batch.x[:, :, :2], clean.x[:, :, :2])
    assert batch.timestep_BT.tolist() == [[0, 0, 250, 250, 250], [0, 0, 1000, 1000, 1000]]


def test_the_sampler_ends_at_the_clip_if_the_velocity_is_what_is_learnt(batches):
    plan = schedule(7)
    batch = batches.noised(torch.ones(2), 0, generator_at(0))
    x = batch.x
    for sigma, following in zip(plan.sigmas, plan.sigmas[1:], strict=False):
        x = euler_step(x, batch.velocity, sigma, following)
    clean = batches.noised(torch.zeros(2), 0, generator_at(0)).x
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4)


def test_the_dit_learns_and_starts_from_the_same_weights(small_batches, tmp_path):
    one, other = dit.new_dit(), dit.new_dit()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    training = Training(one, Plan(steps=8, rate=3e-3, warmup=2), tmp_path, "dit")
    before = small_batches.loss_at(one, 0)["velocity"].item()
    training.run(lambda step: small_batches.loss_at(one, 0))
    assert small_batches.loss_at(one, 0)["velocity"].item() < 0.8 * before


def test_a_lora_is_nothing_at_first_and_something_after_a_step(small_batches, tmp_path):
    model = moved_dit()
    path = lora.train_lora(model, small_batches, tmp_path, Plan(steps=1, rate=1e-2, warmup=1))
    found = read_lora(path)
    check_fits(found, dit.CONFIG)
    check_values(found)
    assert len(found.modules) == 8 * dit.CONFIG.depth
    assert len(found.modules["blocks.0.attn.qkv"].ups) == 3
    ups = [t for name, t in load_file(path).items() if "lora_up" in name]
    assert any(up.abs().max() > 0 for up in ups)


def test_the_parts_make_a_sound_checkpoint(small_batches, reader, untrained_vae, tmp_path):
    made = tmp_path / "checkpoint"
    model = dit.new_dit()
    change = lora.train_lora(model, small_batches, tmp_path, Plan(steps=1, rate=1e-2, warmup=1))
    write_checkpoint(made, model, untrained_vae, small_batches.statistics, reader, change)
    report = validate(made)
    assert report.ok, report.problems
    assert (report.layout, report.naming, report.components_missing) == ("released", "original", [])


def test_a_finished_training_is_said_to_be_and_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr("sys.argv", ["train_toy", "--out", str(tmp_path)])
    command.main()
    assert "is finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_runtime_encodes_a_caption_as_the_training_did(reader, tmp_path):
    reader.encoder.save_pretrained(tmp_path / "text_encoder")
    reader.tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = TextEncoder(tmp_path, text_tokens=text.TEXT_TOKENS)
    found = encoder.encode(["a red circle moves left"])
    embeds, mask = reader.encode(["a red circle moves left"])
    torch.testing.assert_close(found.embeds[:, 0], embeds, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.mask, mask.bool())
