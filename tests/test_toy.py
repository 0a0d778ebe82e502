"""The trained toy shows what prompts say, and mistakes that leave plausible numbers are seen.

The prompts are about combinations of colour, shape and direction that its training never saw. A
score is the share of the attributes that are read back from the videos.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import lcexport.runtime.denoiser
import lcexport.runtime.sampler
import lcexport.runtime.vae
from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import preset_from
from lcexport.demo import TOY
from lcexport.dit import dit_from_tensors, load_dit
from lcexport.dit.blocks import Block
from lcexport.engines.files import sha256_of
from lcexport.lora import LoraChoice, open_merge, swapped
from lcexport.runtime import Pipeline, Video, load
from lcexport.runtime.guidance import cfg_zero, plain_cfg
from lcexport.runtime.schedule import euler_step, euler_step_, schedule
from lcexport.runtime.text import TextEncoder
from tools.train_toy.evaluate import held_scenes
from tools.train_toy.score import read
from tools.train_toy.training import generator_at
from tools.train_toy.world import SPEEDS, Clip, Scene, full_caption, placed, render

BuildPackages = Callable[[BuildOptions], Path]
SCENES = held_scenes(8)
ASKED = ("colour", "shape", "direction")
LORA = LoraChoice(path=TOY / "lora" / "cfg_step_lora.safetensors")
ENGINES_DIFFER = 2e-4  # the most that a pixel may, of 1; they do by 1e-5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every task, run by ONNX Runtime."""
    output = tmp_path_factory.mktemp("toy") / "bundle"
    build(toy_options(output, tasks=("t2v", "i2v", "vc"), cond_frames=5))
    return output


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, build_packages: BuildPackages) -> Path:
    """For text to video, run by AOTInductor."""
    output = tmp_path_factory.mktemp("toy-packages") / "bundle"
    return build_packages(toy_options(output, backends=("aotinductor",)))


def toy_options(output: Path, **choices: object) -> BuildOptions:
    given = {"model": TOY, "output": output, "presets": (preset_from("toy"),), **choices}
    return BuildOptions.model_validate(given)


@pytest.fixture(scope="module")
def eager(bundle: Path) -> Iterator[Pipeline]:
    with load(bundle, "toy", "eager", tasks=["t2v"]) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def right(eager: Pipeline) -> list[Video]:
    """The scenes' videos, as eager torch makes them."""
    return videos(eager)


def videos(pipe: Pipeline, count: int = len(SCENES), **options: float) -> list[Video]:
    return [
        pipe.generate(full_caption(scene), seed=seed, **options)  # pyright: ignore
        for seed, scene in enumerate(SCENES[:count])
    ]


def frames_of(clip: Clip, frames: int) -> torch.Tensor:
    """[F, H, W, 3] in 0..1."""
    return render([clip], frames)[0].permute(1, 2, 3, 0) / 2 + 0.5


def score(made: list[Video]) -> float:
    """Share of what was asked for that is seen."""
    readings = [read(video.frames) for video in made]
    right = [r.agrees(s)[name] for r, s in zip(readings, SCENES, strict=False) for name in ASKED]
    return sum(right) / len(right)


def differences(made: list[Video], right: list[Video]) -> torch.Tensor:
    """Of every number of these videos from those, absolute."""
    pairs = zip(made, right, strict=False)
    return torch.stack([(ours.frames - theirs.frames).abs() for ours, theirs in pairs])


def fit(made: list[Video]) -> float:
    """How well what is seen covers an ideal shape, 0..1; the mean of the videos."""
    return sum(read(video.frames).fit for video in made) / len(made)


def test_its_files_are_the_ones_that_the_model_card_tells_of():
    lines = (TOY / "SHA256SUMS").read_text("utf-8").splitlines()
    told = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.relative_to(TOY).as_posix() for path in TOY.rglob("*") if path.is_file()}
    assert set(told) == files - {"SHA256SUMS", "README.md", "curves.png"}
    assert {name: sha256_of(TOY / name) for name in told} == told
    assert sum((TOY / name).stat().st_size for name in files) < 25e6


def test_videos_show_what_their_prompts_say(right):
    assert score(right) >= 0.9


@pytest.mark.parametrize("backend", ["onnxruntime", "aotinductor"])
def test_an_engine_shows_the_same_videos(bundle, compiled, right, backend):
    folder = compiled if backend == "aotinductor" else bundle
    with load(folder, "toy", backend, tasks=["t2v"]) as pipe:
        assert differences(videos(pipe, 3), right).max() < ENGINES_DIFFER


def test_modulation_in_bfloat16_differs_more_than_engines_may(eager, right, monkeypatch):
    def rounded(self, time, size):
        return [part.bfloat16().float() for part in modulation(self, time, size)]

    modulation = Block.modulation
    monkeypatch.setattr(Block, "modulation", rounded)
    assert differences(videos(eager, 3), right).max() > 10 * ENGINES_DIFFER


def test_a_video_from_an_image_starts_with_it_and_goes_where_it_is_asked(bundle):
    scene = SCENES[0]
    clip = placed(scene, generator_at(0))
    image = Image.fromarray((frames_of(clip, 1)[0] * 255).round().byte().numpy())
    with load(bundle, "toy", "onnxruntime", tasks=["i2v"]) as pipe:
        made = pipe.generate(full_caption(scene), image=image, task="i2v", seed=1)

    def error(given: Clip) -> float:
        return float((made.frames[0] - frames_of(given, 1)[0]).abs().mean())

    assert error(clip) < 0.006 < error(replace(clip, scene=replace(scene, shape="circle")))
    assert error(replace(clip, x=clip.x + 4)) > 0.006
    reading = read(made.frames)
    assert reading.centres is not None
    assert (reading.centres[0] - torch.tensor(clip.centre(0))).norm() < 1
    assert all(reading.agrees(scene)[name] for name in ASKED)


def test_its_lora_shows_the_prompts_in_sixteen_steps_without_guidance(tmp_path):
    build(toy_options(tmp_path / "distilled", loras=(LORA,)))
    with load(tmp_path / "distilled", "toy", "onnxruntime") as pipe:
        assert score(videos(pipe, distill=True)) >= 0.7


@torch.no_grad()
def test_its_lora_comes_nearer_to_guidance_than_the_model_without_it():
    base = load_dit(TOY)
    weights = swapped(base.state_dict(), open_merge([LORA], base.config))
    distilled = dit_from_tensors(base.config, weights)
    encoder = TextEncoder(TOY, preset_from("toy").text_tokens)
    text = encoder.encode([full_caption(scene) for scene in SCENES])
    empty = encoder.encode([""] * len(SCENES))
    plan = schedule(16, distill=True)
    x = torch.randn(len(SCENES), *preset_from("toy").latent_shape, generator=generator_at(0))
    with_lora, without = [], []
    for step, time in enumerate(plan.timesteps):
        timestep = time.expand(len(x), x.shape[2])
        cond = base(x, text.embeds, timestep, text.mask)
        guided = cfg_zero(cond, base(x, empty.embeds, timestep, empty.mask), 4.0)
        with_lora.append(distilled(x, text.embeds, timestep, text.mask) - guided)
        without.append(cond - guided)
        x = euler_step(x, guided, plan.sigmas[step], plan.sigmas[step + 1])
    assert torch.stack(with_lora).norm() < 0.8 * torch.stack(without).norm()


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_continuation_goes_on_as_its_source_does(bundle, speed):
    clip = Clip(Scene("red", "circle", "right", speed, "small", "black"), 10.0, 32.0)
    source = (frames_of(clip, 9) * 255).round().byte().numpy()
    with load(bundle, "toy", "onnxruntime", tasks=["vc"]) as pipe:
        made = pipe.generate(full_caption(clip.scene), video=source, task="vc", seed=1)
    new = read(made.frames[5:])
    assert (new.direction, new.speed) == ("right", speed), new
    assert new.centres is not None
    assert (new.centres[0] - torch.tensor(clip.centre(9))).norm() < 1


def forget_the_negation(patch: pytest.MonkeyPatch) -> None:
    def step(latents, velocity, drop, *buffers):
        return euler_step_(latents, velocity, -drop, *buffers)

    patch.setattr(lcexport.runtime.sampler, "euler_step_", step)


def swap_shift_and_scale(patch: pytest.MonkeyPatch) -> None:
    modulation = Block.modulation

    def swapped(self, time, size):
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation(self, time, size)
        return [scale_a, shift_a, gate_a, scale_f, shift_f, gate_f]

    patch.setattr(Block, "modulation", swapped)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the negation is forgotten": forget_the_negation,
    "shift and scale are swapped": swap_shift_and_scale,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_lowers_the_score(eager, right, mistake, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    assert score(videos(eager)) <= score(right) - 0.5


def test_latents_that_are_not_denormalised_lower_the_score(eager, right, monkeypatch):
    """By less: colours and shapes fade, motion is still seen."""
    monkeypatch.setattr(lcexport.runtime.vae, "denormalize", lambda latents, mean, std: latents)
    made = videos(eager)
    assert score(made) <= score(right) - 0.1
    assert differences(made, right).mean() > 0.03  # 0.045


def test_at_a_high_scale_plain_guidance_blurs_shapes_more_than_zero_guidance(eager, monkeypatch):
    kept = fit(videos(eager, guidance_scale=16.0))
    monkeypatch.setattr(lcexport.runtime.denoiser, "cfg_zero", plain)
    assert fit(videos(eager, guidance_scale=16.0)) <= kept - 0.08


def plain(cond, uncond, scale, scratch=None, out=None):
    return plain_cfg(cond, uncond, scale, out)
