"""A bundle in, videos out, with an engine that takes no time."""

import json
import threading

import pytest
import torch

from lcexport.configs.errors import (
    Cancelled,
    IncompatibleError,
    InputError,
    IntegrityError,
    UsageError,
    VerificationError,
)
from lcexport.runtime import CancelToken, StepEvent, Video, components, load
from lcexport.runtime.sampler import sample
from lcexport.runtime.schedule import schedule
from lcexport.runtime.vae import VideoVAE


@pytest.fixture
def engine(fake_engine):
    return fake_engine(1)


@pytest.fixture
def pipe(bundle, engine):
    with load(bundle, "tiny", engine=engine) as pipe:
        yield pipe


def test_one_prompt_makes_one_video(pipe, engine, recorded):
    video = pipe.generate("a cat plays the piano", seed=7, on_step=recorded.add)
    assert isinstance(video, Video)
    assert video.frames.shape == (9, 64, 96, 3)
    assert video.frames.dtype == torch.float32
    assert (video.fps, video.seed) == (8, 7)
    assert set(video.timings) == {"text", "denoise", "decode"}
    assert len(engine.calls) == 3 * 2  # the preset's steps, two branches
    events: list[StepEvent] = recorded.events
    plan = schedule(3, 12.0)
    assert [e.step for e in events] == [1, 2, 3]
    assert [e.timestep for e in events] == plan.timesteps.tolist()
    assert [e.sigma for e in events] == plan.sigmas[:-1].tolist()
    assert {e.steps for e in events} == {3}
    assert not torch.equal(events[0].latents, events[1].latents)


def test_a_seed_gives_the_same_video_and_another_seed_another(pipe):
    first, again, other = (pipe.generate("a cat", seed=seed, steps=1) for seed in (3, 3, 4))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


def test_frames_come_one_by_one_and_are_those_of_the_video(pipe):
    video = pipe.generate("a cat", seed=3, steps=1)
    latents = pipe.generate("a cat", seed=3, steps=1, output="latents")
    groups = list(pipe.frames(latents))
    assert [len(frames) for frames in groups] == [1, 4, 4]
    assert torch.equal(torch.cat(groups), video.frames)
    assert torch.equal(torch.cat(list(pipe.frames(latents[0]))), video.frames)


def test_a_batch_is_decoded_with_the_vae_loaded_once(bundle, fake_engine, monkeypatch):
    loads = []
    monkeypatch.setattr(
        components, "VideoVAE", lambda *a, **k: loads.append(k) or VideoVAE(*a, **k)
    )
    with load(bundle, "tiny", engine=fake_engine(1), offload="release") as pipe:
        assert len(pipe.generate(["a cat", "a dog"], steps=1)) == 2
    assert [given["tiling"] for given in loads] == [False]


def test_the_vae_works_in_tiles_where_it_is_told_to(bundle, fake_engine, monkeypatch):
    tiling = []
    monkeypatch.setattr(
        components, "VideoVAE", lambda *a, **k: tiling.append(k) or VideoVAE(*a, **k)
    )
    with load(bundle, "tiny", engine=fake_engine(1), vae_tiling=True) as pipe:
        assert pipe.generate("a cat", steps=1).frames.shape == (9, 64, 96, 3)
    assert [given["tiling"] for given in tiling] == [True]


@pytest.mark.parametrize("prompts", [[], "a cat", None])
def test_only_a_list_of_prompts_is_encoded(pipe, prompts):
    with pytest.raises(UsageError, match="these are no prompts"):
        pipe.encode(prompts)


def test_decoding_can_be_cancelled_between_frames(pipe):
    token = CancelToken()
    frames = pipe.frames(torch.randn(16, 3, 8, 12), token)
    assert len(next(frames)) == 1
    token.cancel()
    with pytest.raises(Cancelled):
        next(frames)


@pytest.mark.parametrize("shape", [(2, 16, 3, 8, 12), (3, 8, 12), (8, 3, 8, 12)])
def test_frames_are_of_one_video(pipe, shape):
    with pytest.raises(UsageError, match="not the latents of one video"):
        pipe.frames(torch.zeros(shape))


def test_two_prompts_equal_two_runs_with_the_same_noise(bundle, fake_engine):
    prompts, noise = ["a cat", "a dog plays the drums"], torch.randn(2, 16, 3, 8, 12)
    alone = []
    with load(bundle, "tiny", engine=fake_engine(1)) as pipe:
        for prompt, one in zip(prompts, noise, strict=True):
            alone.append(pipe.generate(prompt, "blurry", latents=one[None]))
    with load(bundle, "tiny", engine=fake_engine(2)) as pipe:
        both = pipe.generate(prompts, "blurry", latents=noise)
    assert len(both) == 2
    for video, expected in zip(both, alone, strict=True):
        assert video.seed is None
        torch.testing.assert_close(video.frames, expected.frames, rtol=0, atol=1e-4)


def test_a_batch_draws_its_noise_once(pipe, recorded):
    noise = torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    drawn = pipe.generate(["a cat", "a dog"], seed=5, steps=1, output="latents")
    given = pipe.generate(["a cat", "a dog"], latents=noise, steps=1, output="latents")
    assert drawn.shape == (2, 16, 3, 8, 12)
    assert torch.equal(drawn, given)


def test_scale_one_asks_the_engine_once_per_step(pipe, engine):
    pipe.generate("a cat", steps=2, guidance_scale=1.0, output="latents")
    assert len(engine.calls) == 2


def test_the_negative_prompt_matters_and_defaults_to_empty(pipe):
    none, empty, blurry = (
        pipe.generate("a cat", negative, steps=1, output="latents")
        for negative in (None, "", "blurry")
    )
    assert torch.equal(none, empty)
    assert not torch.equal(none, blurry)


def test_distilled_defaults(pipe, engine, recorded):
    pipe.generate("a cat", distill=True, on_step=recorded.add, output="latents")
    assert len(engine.calls) == 16
    expected = schedule(16, 12.0, distill=True).timesteps.tolist()
    assert [e.timestep for e in recorded.events] == expected


def test_the_loop_replays_the_original_sampling(golden, recorded):
    case = golden("denoise_tiny")
    outputs = iter([-case[f"model_output_{i}"] for i in range(6)])
    final = sample(lambda x, t: next(outputs), case["latents_init"], schedule(6), recorded.add)
    torch.testing.assert_close(final, case["final"], rtol=0, atol=1e-6)
    for i, event in enumerate(recorded.events):
        torch.testing.assert_close(event.latents, case[f"latents_after_{i}"], rtol=0, atol=1e-6)


def test_cancel_takes_effect_within_one_step(pipe, engine):
    token = CancelToken()

    def stop_in_step_two(event):
        if event.step == 2:
            thread = threading.Thread(target=token.cancel)
            thread.start()
            thread.join()

    with pytest.raises(Cancelled):
        pipe.generate("a cat", steps=50, on_step=stop_in_step_two, cancel=token)
    assert len(engine.calls) == 2 * 2
    assert isinstance(pipe.generate("a cat", steps=1), Video)  # and can go on


def test_a_token_set_before_stops_before_the_engine(pipe, engine):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        pipe.generate("a cat", cancel=token)
    assert engine.calls == []


def test_cancel_after_the_last_step_stops_before_decoding(pipe):
    token = CancelToken()
    with pytest.raises(Cancelled):
        pipe.generate("a cat", steps=1, on_step=lambda event: token.cancel(), cancel=token)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_step(pipe, engine, value):
    run = engine.run

    def break_in_the_third_call(inputs, outputs):
        run(inputs, outputs)
        if len(engine.calls) == 3:
            outputs["velocity"][0, 0, 0, 0, 0] = value

    engine.run = break_in_the_third_call
    with pytest.raises(VerificationError, match=rf"step 3 of 5 .* to {value}"):
        pipe.generate("a cat", steps=5, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " &nbsp; \n"}, "prompt is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a cat", ""]}, "prompt 2 of 2 is empty"),
        ({"prompt": 3}, "not text"),
        ({"prompt": ["a cat", 3]}, "not text"),
        ({"prompt": "a" * 100_001}, "too long"),
        ({"negative_prompt": "a" * 100_001}, "too long"),
        ({"negative_prompt": ["blurry"]}, "do not match"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "differ in number; got 2 and 1"),
        ({"seed": -1}, "seed is out of range"),
        ({"seed": 2**63}, "seed is out of range"),
        ({"seed": 1.5}, "seed is out of range"),
        ({"steps": 0}, "steps is out of range"),
        ({"steps": 1001}, "steps is out of range"),
        ({"steps": 51, "distill": True}, r"wanted 1\.\.50"),
        ({"guidance_scale": -1.0}, "negative guidance"),
        ({"guidance_scale": 0.5}, "guidance_scale is out of range"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": float("inf")}, "finite"),
        ({"guidance_scale": "4"}, "finite"),
        ({"output": "gif"}, "unknown output"),
        ({"latents": torch.zeros(1, 16, 3, 8, 10)}, "initial latents do not fit"),
        ({"latents": torch.zeros(1, 16, 3, 8, 12).double()}, "initial latents do not fit"),
        ({"latents": torch.full((1, 16, 3, 8, 12), torch.nan)}, "not finite"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(pipe, engine, arguments, message):
    with pytest.raises(UsageError, match=message):
        pipe.generate(**{"prompt": "a cat", **arguments})
    assert engine.calls == []


def test_the_largest_seed(pipe):
    assert pipe.generate("a cat", seed=2**63 - 1, steps=1, output="latents").isfinite().all()


@pytest.mark.parametrize("offload", ["keep", "cpu", "release"])
def test_offload_policies_give_the_same_video(bundle, fake_engine, pipe, offload):
    expected = pipe.generate("a cat", steps=1)
    with load(bundle, "tiny", engine=fake_engine(1), offload=offload) as other:
        for _ in range(2):
            assert torch.equal(other.generate("a cat", steps=1).frames, expected.frames)


def test_a_bfloat16_bundle_rounds_the_text(make_bundle, tmp_path, engine):
    folder = make_bundle(tmp_path / "bundle", precision="bf16")
    with load(folder, "tiny", engine=engine) as pipe:
        video = pipe.generate("a cat", steps=1)
    text = engine.calls[0]["encoder_hidden_states"]
    assert text.dtype == torch.float32
    assert torch.equal(text, text.bfloat16().float())
    assert video.frames.dtype == torch.float32


def test_the_shift_is_the_bundles(make_bundle, tmp_path, engine, recorded):
    folder = make_bundle(tmp_path / "bundle", scheduler='{"shift": 3, "other": "ignored"}')
    with load(folder, "tiny", engine=engine) as pipe:
        pipe.generate("a cat", on_step=recorded.add, output="latents")
    assert [e.timestep for e in recorded.events] == schedule(3, 3.0).timesteps.tolist()


@pytest.mark.parametrize("scheduler", ["{}", "[]", "not JSON", '{"shift": -1}', '{"shift": "a"}'])
def test_a_scheduler_without_a_usable_shift(make_bundle, tmp_path, engine, scheduler):
    folder = make_bundle(tmp_path / "bundle", scheduler=scheduler)
    with pytest.raises(InputError, match="scheduler_config"):
        load(folder, "tiny", engine=engine)


def test_a_bundle_without_a_scheduler(make_bundle, tmp_path, engine):
    folder = make_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["files"]["scheduler/scheduler_config.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="scheduler_config"):
        load(folder, "tiny", engine=engine)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolution": "720p"}, UsageError, "one of tiny"),
        ({"offload": "disk"}, UsageError, "keep, cpu, release"),
        ({"device": "toaster"}, UsageError, "unknown device"),
        ({"device": "cuda:63"}, IncompatibleError, "no such GPU"),
        ({"backend": "abacus", "engine": None}, UsageError, "unknown backend"),
    ],
)
def test_load_refuses(bundle, engine, arguments, error, message):
    with pytest.raises(error, match=message):
        load(bundle, **{"resolution": "tiny", "engine": engine, **arguments})


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(IntegrityError, match="not a bundle"):
        load(tmp_path)


def test_an_engine_of_another_shape(bundle, fake_engine):
    with pytest.raises(IncompatibleError, match="not made for the graph tiny"):
        load(bundle, "tiny", engine=fake_engine(1, (16, 3, 8, 16)))


def test_closing_twice_is_harmless_and_leaves_the_callers_engine(bundle, engine):
    pipe = load(bundle, "tiny", engine=engine)
    pipe.close()
    pipe.close()
    assert engine.closed == 0
    with pytest.raises(UsageError, match="closed"):
        pipe.generate("a cat")


def test_an_engine_it_opened_is_closed(bundle, engine, monkeypatch):
    monkeypatch.setattr("lcexport.runtime.components.open_engine", lambda *arguments: engine)
    with load(bundle, "tiny"):
        assert engine.closed == 0
    assert engine.closed == 1


def test_an_engine_it_opened_is_closed_when_loading_fails(bundle, fake_engine, monkeypatch):
    engine = fake_engine(1, (16, 3, 8, 16))
    monkeypatch.setattr("lcexport.runtime.components.open_engine", lambda *arguments: engine)
    with pytest.raises(IncompatibleError):
        load(bundle, "tiny")
    assert engine.closed == 1


def test_nothing_is_printed(bundle, engine, capfd):
    with load(bundle, "tiny", engine=engine) as pipe:
        pipe.generate("a cat", steps=1)
    assert capfd.readouterr() == ("", "")
