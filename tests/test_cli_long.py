"""`lcexport long`: what it hands to the runtime, what it continues, and what it refuses."""

import json
import sys

import av
import pytest
import torch

from lcexport import cli
from lcexport.runtime import Pipeline, Video

PIXELS = {False: (13, 64, 96, 3), True: (26, 64, 128, 3)}  # of a segment, and of a refined window


@pytest.fixture
def run(monkeypatch, capsys, long_bundle):
    """`run("--prompt", "a cat", ...)` -> (exit code, stdout, stderr) of `lcexport long`."""

    def call(*words: object) -> tuple[int, str, str]:
        command = ["lcexport", "long", long_bundle, "--backend", "eager", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), streams.out, streams.err

    return call


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
        (["--prompt", "a cat", "--refine", "--spatial"], 2, "--task spatial --add"),
        (["--prompt", "a cat", "--image", "no-such.png"], 2, "--task i2v --add"),
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
