"""`lcexport long`: what it hands to the runtime, what it continues, and what it refuses."""

import json

import av
import pytest
import torch
from PIL import Image

from lcexport import cli
from lcexport.configs.errors import UsageError
from lcexport.engines.manifest import MANIFEST, manifest_json, read_manifest
from lcexport.runtime import Pipeline, Video

RES = "64x96x13"
PIXELS = {False: (13, 64, 96, 3), True: (26, 64, 128, 3)}  # of a segment, and of a refined window


@pytest.fixture
def run(run, long_bundle):
    """`run("--prompt", "a cat", ...)` -> (exit code, stdout, stderr) of `lcexport long`."""
    return lambda *words, bundle=long_bundle: run("long", bundle, "--backend", "eager", *words)


@pytest.fixture
def calls(monkeypatch):
    """Generation and refinement made instant; what each was asked."""
    seen = []

    def frames(refined, seed):
        generator = torch.Generator().manual_seed(seed)
        return Video(torch.rand(PIXELS[refined], generator=generator), 15)

    def generate(pipe, prompt, negative_prompt=None, **options):
        seen.append({"prompt": prompt, "negative_prompt": negative_prompt, **options})
        return frames(False, options["seed"])

    def refine(pipe, video, prompt="", **options):
        seen.append({"refine": prompt, **options})
        return frames(True, options["seed"])

    monkeypatch.setattr(Pipeline, "generate", generate)
    monkeypatch.setattr(Pipeline, "refine", refine)
    return seen


def length(path) -> int:
    with av.open(str(path)) as container:
        return len(list(container.decode(video=0)))


def test_a_prompt_for_each_segment(run, calls, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a dog \nrain\n")
    code, out, err = run(
        "--prompts", prompts, "--out", tmp_path / "x.mp4", "--work", tmp_path / "work", "--seed", 5,
        "--steps", 2, "--guidance-scale", 3, "--negative-prompt", "blurry", "--no-enhance-hf",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["frames"] == length(tmp_path / "x.mp4") == 29
    assert [call["prompt"] for call in calls] == ["a cat", "a dog", "rain"]
    assert calls[0]["seed"] == 5
    assert calls[1]["enhance_hf"] is False
    for call in calls:
        assert (call["steps"], call["guidance_scale"], call["distill"]) == (2, 3, False)
        assert call["negative_prompt"] == "blurry"


def test_running_it_again_continues(run, calls, tmp_path, monkeypatch):
    words = ["--prompt", "a cat", "--segments", 3, "--work", tmp_path / "work", "--out"]
    generate = Pipeline.generate

    def interrupted(*given, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(Pipeline, "generate", interrupted)
    code, _, err = run(*words, tmp_path / "x.mp4")
    assert code == 130
    assert "run again" in err
    assert not (tmp_path / "x.mp4").exists()
    monkeypatch.setattr(Pipeline, "generate", generate)
    code, out, err = run(*words, tmp_path / "x.mp4")
    assert code == 0, err
    assert len(calls) == 3
    assert "29 frames" in out


def test_refined_window_by_window(run, calls, tmp_path):
    code, out, err = run(
        "--prompt", "a cat", "--segments", 2, "--refine", "--work", tmp_path / "work", "--out",
        tmp_path / "x.mp4", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert [call.get("refine") for call in calls] == [None, None, "", ""]
    assert [call.get("cond_video") is None for call in calls] == [True, True, True, False]
    document = json.loads(out)
    assert (document["frames"], document["fps"]) == (42, 30)
    assert length(tmp_path / "x.mp4") == 42


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "not said, or said twice"),
        (["--prompt", "a cat", "--prompts", "x.txt"], 2, "not said, or said twice"),
        (["--prompts", "no-such.txt"], 3, "no-such.txt cannot be read"),
        (["--prompt", "a cat", "--segments", 0], 2, "segments is out of range"),
        (["--prompt", " "], 2, "is empty"),
        (["--prompt", "a cat", "--spatial"], 2, "Add --refine"),
        (
            ["--prompt", "a cat", "--refine", "--spatial"],
            2,
            "--task spatial --refine-size 64x128 ",
        ),
        (["--prompt", "a cat", "--image", "no-such.png"], 3, "no-such.png is missing"),
        (["--prompt", "a cat", "--image", "a.png", "--video", "a.mp4"], 2, "an image and a video"),
        (["--prompt", "a cat", "--video", "no-such.mp4"], 3, "no-such.mp4 is missing"),
        (["--prompt", "a cat", "--res", "720p"], 2, "720p"),
    ],
)
def test_one_clear_error_before_anything_is_made(run, calls, tmp_path, words, code, message):
    found, _, err = run(*words, "--out", tmp_path / "x.mp4", "--work", tmp_path / "work")
    assert found == code, err
    assert message in err
    assert err.count("error:") == 1
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files(tmp_path_factory):
    """A folder with a video and a picture of it, wide as 480p is."""
    folder = tmp_path_factory.mktemp("given")
    frames = torch.rand(10, 72, 128, 3)
    Video(frames, 15).save(folder / "wide.mp4")
    Image.fromarray(Video(frames, 15).to_uint8()[0]).save(folder / "wide.png")
    return folder


def with_480p(folder, output):
    """The manifest of a bundle as if its graphs were built at 480p's size, and for images, too."""
    manifest = read_manifest(folder)
    graphs = dict(manifest.graphs)
    for graph in manifest.graphs.values():
        size = {"height": 480, "width": 832}
        preset = graph.preset.model_copy(update={"name": "480p", **size})
        larger = graph.job.model_copy(update={"preset": preset, **size})
        for job in (larger, larger.model_copy(update={"task": "i2v", "num_cond_latents": 1})):
            graphs[job.name] = graph.model_copy(update={"job": job})
    output.mkdir()
    (output / MANIFEST).write_bytes(manifest_json(manifest.model_copy(update={"graphs": graphs})))
    return output


@pytest.mark.parametrize("option", [("--image", "wide.png"), ("--video", "wide.mp4"), ()])
def test_the_resolution_is_chosen_as_generate_chooses_it(
    run, long_bundle, files, tmp_path, monkeypatch, option
):
    opened = []

    def stop(bundle, resolution, **options):
        opened.append(resolution)
        raise UsageError("stopped here")

    monkeypatch.setattr(cli.long, "open_pipeline", stop)
    bundle = with_480p(long_bundle, tmp_path / "bundle")
    given = [option[0], files / option[1]] if option else []
    words = ["--prompt", "a cat", *given, "--out", tmp_path / "x.mp4", "--work", tmp_path / "w"]
    for more in ([], ["--res", "480p"]):
        code, _, err = run(*words, *more, bundle=bundle)
        assert (code, err) == (2, "error: stopped here\n")
    assert opened == ["480p" if option else RES, "480p"]


@pytest.mark.parametrize(
    ("option", "size"),
    [(("--image", "wide.png"), "480x832x13"), (("--video", "wide.mp4"), "480x832x13")],
)
def test_a_resolution_that_is_lacking_is_said_before_anything_is_made(
    run, calls, files, tmp_path, option, size
):
    words = [option[0], files / option[1], "--out", tmp_path / "x.mp4", "--work", tmp_path / "w"]
    code, _, err = run("--prompt", "a cat", *words)
    assert code == 2
    assert f"lcexport build --res {size} --task " in err
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_is_too_short_is_refused_at_once(run, calls, tmp_path):
    Video(torch.rand(3, 64, 96, 3), 15).save(tmp_path / "short.mp4")
    code, _, err = run(
        "--prompt", "a cat", "--video", tmp_path / "short.mp4", "--res", RES, "--out",
        tmp_path / "x.mp4", "--work", tmp_path / "w",
    )  # fmt: skip
    assert code == 2
    assert "too short to continue; got 3 frames" in err
    assert calls == []
    assert not (tmp_path / "w").exists()


def test_a_file_without_prompts(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    code, _, err = run("--prompts", tmp_path / "p.txt", "--out", tmp_path / "x.mp4", "--work", "w")
    assert code == 3
    assert "has no prompt in it" in err


def test_an_existing_video_is_refused_at_once(run, calls, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"mine")
    code, _, err = run("--prompt", "a cat", "--out", tmp_path / "x.mp4", "--work", tmp_path / "w")
    assert code == 4
    assert "will not overwrite" in err
    assert calls == []
    assert not (tmp_path / "w").exists()


def test_another_request_in_the_same_folder(run, calls, tmp_path):
    words = ["--segments", 1, "--work", tmp_path / "work", "--out"]
    assert run("--prompt", "a cat", *words, tmp_path / "x.mp4")[0] == 0
    code, _, err = run("--prompt", "a dog", *words, tmp_path / "y.mp4")
    assert code == 2
    assert "prompts differ" in err
    assert not (tmp_path / "y.mp4").exists()
