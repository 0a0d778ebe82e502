"""The trained toy shows what prompts say, and mistakes that leave plausible numbers are seen.

The prompts are about combinations of colour, shape and direction that its training never saw. A
score is the share of the attributes that are read back from the videos.
"""

from collections.abc import Callable, Iterator
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
from lcexport.dit.blocks import Block
from lcexport.engines.files import sha256_of
from lcexport.lora import LoraChoice
from lcexport.runtime import Pipeline, Video, load
from lcexport.runtime.guidance import plain_cfg
from lcexport.runtime.schedule import euler_step_
from tools.train_toy.evaluate import held_scenes
from tools.train_toy.score import read
from tools.train_toy.training import generator_at
from tools.train_toy.world import Clip, Scene, full_caption, placed, render

BuildPackages = Callable[[BuildOptions], Path]
SCENES = held_scenes(6)
ASKED = ("colour", "shape", "direction")


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


def score(made: list[Video]) -> float:
    """Share of what was asked for that is seen."""
    readings = [read(video.frames) for video in made]
    right = [r.agrees(s)[name] for r, s in zip(readings, SCENES, strict=False) for name in ASKED]
    return sum(right) / len(right)


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
        for theirs, ours in zip(videos(pipe, 3), right, strict=False):
            torch.testing.assert_close(theirs.frames, ours.frames, rtol=0, atol=2e-3)


def test_a_video_from_an_image_starts_with_it_and_goes_where_it_is_asked(bundle):
    scene = SCENES[0]
    clip = placed(scene, generator_at(0))
    first = render([clip], frames=1)[0, :, 0].permute(1, 2, 0) / 2 + 0.5
    image = Image.fromarray((first * 255).round().byte().numpy())
    with load(bundle, "toy", "onnxruntime", tasks=["i2v"]) as pipe:
        made = pipe.generate(full_caption(scene), image=image, task="i2v", seed=1)
    assert (made.frames[0] - first).abs().mean() < 0.02
    assert all(read(made.frames).agrees(scene)[name] for name in ASKED)


def test_its_lora_shows_the_prompts_in_sixteen_steps_without_guidance(tmp_path):
    lora = LoraChoice(path=TOY / "lora" / "cfg_step_lora.safetensors")
    build(toy_options(tmp_path / "distilled", loras=(lora,)))
    with load(tmp_path / "distilled", "toy", "onnxruntime") as pipe:
        assert score(videos(pipe, distill=True)) >= 0.7


def test_a_continuation_keeps_direction_and_speed(bundle):
    scene = Scene("red", "circle", "right", "slowly", "small", "black")
    source = render([Clip(scene, 12.0, 32.0)])[0].permute(1, 2, 3, 0) / 2 + 0.5
    given = (source * 255).round().byte()
    with load(bundle, "toy", "onnxruntime", tasks=["vc"]) as pipe:
        made = pipe.generate(full_caption(scene), video=given.numpy(), task="vc", seed=1)
    reading = read(made.frames)
    assert all(reading.agrees(scene).values()), reading
    assert reading.centres is not None
    start = float(reading.centres[0, 0])  # where the source's last five frames begin
    assert abs(start - (12.0 + 12)) < 2


def forget_the_negation(patch: pytest.MonkeyPatch, pipe: Pipeline) -> None:
    def step(latents, velocity, drop, *buffers):
        return euler_step_(latents, velocity, -drop, *buffers)

    patch.setattr(lcexport.runtime.sampler, "euler_step_", step)


def swap_shift_and_scale(patch: pytest.MonkeyPatch, pipe: Pipeline) -> None:
    modulation = Block.modulation

    def swapped(self, time, size):
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation(self, time, size)
        return [scale_a, shift_a, gate_a, scale_f, shift_f, gate_f]

    patch.setattr(Block, "modulation", swapped)


def leave_latents_normalised(patch: pytest.MonkeyPatch, pipe: Pipeline) -> None:
    patch.setattr(lcexport.runtime.vae, "denormalize", lambda latents, mean, std: latents)


MISTAKES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Pipeline], None], float]] = {
    "the negation is forgotten": (forget_the_negation, 0.5),
    "shift and scale are swapped": (swap_shift_and_scale, 0.5),
    "latents are not denormalised": (leave_latents_normalised, 0.1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_lowers_the_score(eager, right, mistake, monkeypatch):
    make, margin = MISTAKES[mistake]
    make(monkeypatch, eager)
    assert score(videos(eager)) <= score(right) - margin


def test_at_a_high_scale_plain_guidance_blurs_shapes_more_than_zero_guidance(eager, monkeypatch):
    kept = fit(videos(eager, guidance_scale=12.0))
    monkeypatch.setattr(lcexport.runtime.denoiser, "cfg_zero", plain)
    assert fit(videos(eager, guidance_scale=12.0)) <= kept - 0.03


def plain(cond, uncond, scale, scratch=None, out=None):
    return plain_cfg(cond, uncond, scale, out)
