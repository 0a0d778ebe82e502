"""Pictures and videos on the command line: `generate --image`, `--video`, and `refine`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lcexport.builder import BuildOptions, build
from lcexport.cli.given import graph_for, joined, read_source
from lcexport.configs.errors import UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines.bundle import open_bundle
from lcexport.runtime import Pipeline, Video
from lcexport.runtime.media import read_image, read_video, resize_frames_bicubic

FRAMES, HEIGHT, WIDTH = 13, 64, 96
RES = f"{HEIGHT}x{WIDTH}x{FRAMES}"
TASKS = ("i2v", "vc", "refine", "refine-vc")
COND_FRAMES = 5


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, tmp_path_factory):
    """A bundle of the demo checkpoint for some tasks, exported only. Read only."""
    options = BuildOptions(
        model=demo_checkpoint,
        output=tmp_path_factory.mktemp("tasks") / "bundle",
        presets=(preset_from(RES),),
        tasks=TASKS,
        cond_frames=COND_FRAMES,
        refine_size=(64, 128),
        only="export",
    )
    return build(options).folder


def frames_of(count, height, width):
    """A square that moves, uint8 [F, H, W, 3]."""
    frames = np.full((count, height, width, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[height // 4 : height // 2, 2 * number : 2 * number + 20] = (200, 120, 40)
    return frames


def saved(path, frames, fps=15):
    return Video(torch.from_numpy(frames), fps).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of pictures and videos to give. Read only."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(frames_of(1, 60, 90)[0]).save(folder / "cat.png")
    saved(folder / "wide.mp4", frames_of(20, 72, 128), fps=30)  # 10 frames at 15 per second
    saved(folder / "short.mp4", frames_of(4, 64, 96))
    saved(folder / "first.mp4", frames_of(FRAMES, HEIGHT, WIDTH))
    saved(folder / "refined.mp4", frames_of(26, 64, 128), fps=30)
    (folder / "text.mp4").write_text("no video")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture
def run(run, bundle, files, tmp_path):
    """`run("refine", "first.mp4", ...)` -> (exit code, stdout, stderr), writing `tmp_path`'s x.mp4.

    Names of given files become their paths.
    """

    def call(command: str, *words: object) -> tuple[int, str, str]:
        given = [files / str(word) if (files / str(word)).is_file() else word for word in words]
        return run(command, bundle, *given, "--out", tmp_path / "x.mp4", "--backend", "eager")

    return call


@pytest.fixture
def asked(monkeypatch):
    """What the command line asks of the runtime, which then does it: one dictionary a call."""
    calls = []

    def spied(real):
        def call(pipe, *words, **options):
            made = real(pipe, *words, **options)
            engines = set(pipe.components._engines)
            calls.append({**options, "made": made, "engines": engines})
            return made

        return call

    for name in ("generate", "refine"):
        monkeypatch.setattr(Pipeline, name, spied(getattr(Pipeline, name)))
    return calls


@pytest.fixture
def nothing_computed(monkeypatch):
    """A runtime that has made everything already."""
    for name, shape in (("generate", (FRAMES, HEIGHT, WIDTH)), ("refine", (26, 64, 128))):
        video = Video(torch.from_numpy(frames_of(*shape)) / 255, 15)
        monkeypatch.setattr(Pipeline, name, lambda *words, made=video, **options: made)


GENERATE = ("generate", "--prompt", "a cat", "--steps", 1, "--guidance-scale", 1, "--res", RES)


def near(found, wanted):
    """The same pictures in grey, but for what H.264 does to them; its colours are coarser."""
    assert found.shape == wanted.shape
    assert np.abs(grey(found) - grey(wanted)).mean() < 5


def grey(frames):
    return frames @ np.array([0.2126, 0.7152, 0.0722])


def test_an_image_becomes_the_first_frame(run, asked, files, tmp_path):
    code, out, _ = run(*GENERATE, "--image", "cat.png", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["task"], document["resolution"]) == ("i2v", RES)
    assert read_video(tmp_path / "x.mp4")[0].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.array_equal(asked[0]["image"], read_image(files / "cat.png"))
    assert asked[0]["engines"] == {f"{RES}.i2v"}


def test_a_continuation_is_written_behind_its_source(run, asked, files, tmp_path):
    sheet = tmp_path / "x.png"
    code, out, _ = run(
        *GENERATE, "--video", "wide.mp4", "--contact-sheet", sheet, "--offload-cache",
        "--no-enhance-hf",
    )  # fmt: skip
    assert code == 0
    assert f"128 x 72, {10 + FRAMES - COND_FRAMES} frames at 15/s" in " ".join(out.split())
    found, fps = read_video(tmp_path / "x.mp4")
    source, _ = read_video(files / "wide.mp4", 15)
    assert (fps, len(source)) == (15, 10)
    made = asked[0]["made"].to_uint8()[COND_FRAMES:]
    near(found, np.concatenate([source, resize_frames_bicubic(made, 72, 128)]))
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert asked[0]["offload_cache"] is True
    assert asked[0]["engines"] == {f"{RES}.vc", f"{RES}.vc.cache"}


def test_a_continuation_alone(run, nothing_computed, tmp_path):
    words = ("--video", "wide.mp4", "--only-new", "--cond-frames", COND_FRAMES)
    assert run(*GENERATE, *words)[0] == 0
    found, _ = read_video(tmp_path / "x.mp4")
    near(found, frames_of(FRAMES, HEIGHT, WIDTH))


def test_what_is_joined_is_the_source_and_what_is_new():
    before, made = frames_of(6, 30, 46), torch.rand(FRAMES, HEIGHT, WIDTH, 3)
    video = joined(before, Video(made, 15, {"decode": 1.0}, 7), COND_FRAMES)
    after = resize_frames_bicubic(Video(made, 15).to_uint8(), 30, 46)
    found = video.to_uint8()
    assert np.array_equal(found[:6], before)
    assert np.array_equal(found[6:], after[COND_FRAMES:])
    assert (video.fps, video.timings, video.seed) == (15, {"decode": 1.0}, 7)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], {"distill": False, "enhance_hf": None}),
        (["--distill"], {"distill": True, "enhance_hf": None}),
        (["--enhance-hf"], {"distill": False, "enhance_hf": True}),
        (["--no-enhance-hf"], {"distill": False, "enhance_hf": False}),
    ],
)
def test_the_schedule_is_the_runtimes_unless_it_is_given(
    run, nothing_computed, asked, words, wanted
):
    assert run(*GENERATE, "--video", "wide.mp4", *words)[0] == 0
    assert asked[0].items() >= wanted.items()


def test_a_refinement_is_larger_and_has_twice_the_frames(run, asked, tmp_path):
    code, out, _ = run("refine", "first.mp4", "--steps", 5, "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["task"], document["resolution"]) == ("refine", RES)
    assert set(document["seconds"]) == {"text", "encode", "denoise", "decode"}
    found, fps = read_video(tmp_path / "x.mp4")
    near(found, asked[0]["made"].to_uint8())
    assert found.shape == (26, 64, 128, 3)
    assert fps == 30
    assert asked[0]["engines"] == {f"{RES}.refine"}


def test_a_refinement_goes_on_from_refined_frames(run, nothing_computed, asked, files, tmp_path):
    words = ("--cond-video", "refined.mp4", "--threshold", 0.4, "--seed", 3, "--prompt", "a dog")
    code, out, _ = run("refine", "first.mp4", *words)
    assert code == 0
    assert "128 x 64, 26 frames" in " ".join(out.split())
    assert asked[0].items() >= {"t_thresh": 0.4, "seed": 3, "steps": 50, "image": None}.items()
    given = asked[0]["cond_video"]  # the end of it is all that is needed
    assert len(given) == 2 * COND_FRAMES
    assert np.array_equal(given, read_video(files / "refined.mp4")[0][-len(given) :])
    assert asked[0]["engines"] == {f"{RES}.refine-vc"}


BAD = [
    ("generate", ["--image", "no.png"], 3, "no.png is missing"),
    ("generate", ["--image", "text.png"], 3, "no usable picture"),
    ("generate", ["--video", "text.mp4"], 3, "no usable video"),
    ("generate", ["--video", "short.mp4"], 2, "too short to continue; got 4 frames"),
    ("generate", ["--image", "cat.png", "--video", "wide.mp4"], 2, "an image and a video"),
    (
        "generate",
        ["--video", "wide.mp4", "--cond-frames", "9"],
        2,
        f"got --cond-frames 9; wanted 5. Build another: lcexport build --res {RES} --task vc "
        "--cond-frames 9 -o",
    ),
    ("generate", [], 2, f"lcexport build --res {RES} --only export --add"),
    ("generate", ["--cond-frames", "5"], 2, "--cond-frames is for continuations"),
    ("generate", ["--image", "cat.png", "--only-new"], 2, "--only-new is for continuations"),
    (
        "generate",
        ["--video", "wide.mp4", "--no-cache"],
        2,
        "--task vc-uncached --cond-frames 5 ",
    ),
    ("generate", ["--no-cache"], 2, "--no-cache is for continuations"),
    ("generate", ["--offload-cache"], 2, "--offload-cache is for continuations"),
    (
        "generate",
        ["--video", "wide.mp4", "--no-cache", "--offload-cache"],
        2,
        "--offload-cache needs the cache",
    ),
    ("generate", ["--video", "wide.mp4", "--distill", "--enhance-hf"], 2, "two schedules"),
    ("generate", ["--image", "cat.png", "--enhance-hf"], 2, "for continuations; got i2v"),
    (
        "generate",
        ["--image", "cat.png", "--res", "480p"],
        2,
        "--res 480p --task i2v --only ",
    ),
    ("refine", ["wide.mp4"], 2, "not a video of the first stage; got 20 frames of 72 x 128"),
    ("refine", ["text.mp4"], 3, "no usable video"),
    ("refine", ["first.mp4", "--image", "text.png"], 3, "no usable picture"),
    (
        "refine",
        ["first.mp4", "--image", "cat.png"],
        2,
        "--task refine-i2v --refine-size 64x128 ",
    ),
    (
        "refine",
        ["first.mp4", "--spatial"],
        2,
        "--task spatial --refine-size 64x128 ",
    ),
    (
        "refine",
        ["first.mp4", "--res", "480p"],
        2,
        "480p --task refine --refine-size ",
    ),
    ("refine", ["first.mp4", "--cond-video", "short.mp4"], 2, "wanted at least 10"),
    ("refine", ["first.mp4", "--threshold", "2"], 2, "threshold is out of range"),
    (
        "refine",
        ["first.mp4", "--image", "cat.png", "--cond-video", "wide.mp4"],
        2,
        "Give one of them",
    ),
]


@pytest.mark.parametrize(("command", "words", "code", "message"), BAD)
def test_what_cannot_be_done_is_one_error_and_leaves_no_file(
    run, tmp_path, command, words, code, message
):
    if command == "generate":
        words = ["--prompt", "a cat", *words, *([] if "--res" in words else ["--res", RES])]
    found, out, err = run(command, *words)
    assert found == code
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [(*GENERATE, "--image", "text.png"), ("refine", "text.mp4")], ids=lambda v: v[0]
)
def test_nothing_is_read_or_computed_for_a_name_that_is_taken(run, tmp_path, words):
    (tmp_path / "x.mp4").write_bytes(b"mine")
    code, _, err = run(*words)
    assert code == 4
    assert "will not overwrite" in err
    assert (tmp_path / "x.mp4").read_bytes() == b"mine"


def test_an_odd_source_is_refused_before_it_is_continued(run, asked, files, tmp_path):
    frames = frames_of(6, 64, 95)
    Image.fromarray(frames[0]).save(
        files / "odd.gif", save_all=True, append_images=[*map(Image.fromarray, frames[1:])],
        duration=70,
    )  # fmt: skip
    code, _, err = run(*GENERATE, "--video", "odd.gif")
    assert code == 2
    assert "got 64 x 95 pixels. Give --only-new." in err
    assert asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "task", "size"), [("cat.png", "i2v", "512x768x13"), ("wide.mp4", "vc", "480x832x13")]
)
def test_without_a_name_the_originals_size_is_wanted(run, tmp_path, name, task, size):
    option = "--image" if task == "i2v" else "--video"
    code, _, err = run("generate", "--prompt", "a cat", option, name)
    assert code == 2
    height, width, _ = size.split("x")
    assert f"got {RES}; wanted {height} x {width}" in err
    more = f" --cond-frames {COND_FRAMES}" if task == "vc" else ""
    assert f"lcexport build --res {size} --task {task}{more} --only export --add -o " in err
    assert "--res NAME" in err
    assert list(tmp_path.iterdir()) == []


def with_preset(opened, name, height, width):
    """The bundle as if its first resolution were built under this name at this size as well."""
    graphs = dict(opened.manifest.graphs)
    for graph in opened.manifest.graphs.values():
        preset = graph.preset.model_copy(update={"name": name, "height": height, "width": width})
        job = graph.job.model_copy(update={"preset": preset, "height": height, "width": width})
        graphs[job.name] = graph.model_copy(update={"job": job})
    opened.manifest = opened.manifest.model_copy(update={"graphs": graphs})
    return opened


@pytest.mark.parametrize(
    ("size", "wanted"), [((480, 832), "480p"), ((1080, 1920), "480p"), ((1280, 736), "portrait")]
)
def test_the_resolution_of_the_nearest_shape_is_used(bundle, tmp_path, size, wanted):
    opened = with_preset(open_bundle(bundle), "portrait", 832, 480)
    opened = with_preset(opened, "480p", 480, 832)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "a.png")
    source = read_source(tmp_path / "a.png", None, cache=True)
    graph = graph_for(opened, None, source)
    assert (graph.preset.name, graph.job.task) == (wanted, "i2v")
    with pytest.raises(UsageError, match="no resolution for 10 x 10 pixels; got 64x96x13, portr"):
        graph_for(opened, None, replace(source, image=np.zeros((10, 10, 3), np.uint8)))


def test_a_task_that_no_resolution_has_is_added_at_the_nearest_shape(bundle, files):
    source = read_source(None, files / "wide.mp4", cache=False)
    with pytest.raises(
        UsageError,
        match="--res 480x832x13 --task vc-uncached --cond-frames 5 --only export --add -o",
    ):
        graph_for(open_bundle(bundle), None, source)
