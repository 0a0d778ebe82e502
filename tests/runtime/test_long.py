"""Long videos: segments that continue each other, interrupted and not, and their refinement."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from lcexport.configs.errors import (
    Cancelled,
    IncompatibleError,
    IntegrityError,
    LockedError,
    ResourceError,
    UsageError,
)
from lcexport.runtime import (
    CancelToken,
    Video,
    generate_long,
    load,
    refine_long,
)
from lcexport.runtime.long import prompts_for
from lcexport.runtime.long_refining import window
from lcexport.runtime.media import resize_video, truncated_uint8
from lcexport.runtime.segments import JOURNAL, Journal, LongVideo, open_segments, segment_seed

FRAMES, CLEAN = 13, 5  # of the bundle
NEW = FRAMES - CLEAN
TEXTS = ["a cat", "a dog", "rain"]
STEPS = 2


@pytest.fixture(scope="module")
def pipe(tiny):
    with load(tiny, "tiny", "eager", tasks=()) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    """Three segments, in one go. Read only."""
    folder = tmp_path_factory.mktemp("made") / "segments"
    return generate_long(pipe, TEXTS, folder, seed=3, steps=STEPS)


@pytest.fixture(scope="module")
def refined(pipe, made, tmp_path_factory):
    """Its refinement, in one go. Read only."""
    folder = tmp_path_factory.mktemp("refined") / "windows"
    return refine_long(pipe, made, folder, seed=3)


@pytest.fixture
def clip():
    """Frames uint8 [7, 64, 96, 3]: a square that moves."""
    frames = np.zeros((7, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, 4 * number : 4 * number + 20] = (200, 120, 40)
    return frames


@pytest.fixture
def calls(pipe, monkeypatch):
    """The keyword arguments of every `pipe.generate`, which still generates."""
    seen, generate = [], pipe.generate

    def watched(prompt, negative_prompt=None, **options):
        seen.append({"prompt": prompt, "negative_prompt": negative_prompt, **options})
        return generate(prompt, negative_prompt, **options)

    monkeypatch.setattr(pipe, "generate", watched)
    return seen


@pytest.fixture
def fake(pipe, monkeypatch):
    """`pipe.generate` made instant, with frames of float32 noise; `fake` holds weak references."""
    alive = []

    def generate(prompt, negative_prompt=None, **options):
        gc.collect()
        assert not any(frames() is not None for frames in alive), "an earlier segment is in memory"
        generator = torch.Generator().manual_seed(options["seed"])
        frames = torch.rand((FRAMES, 64, 96, 3), generator=generator)
        alive.append(weakref.ref(frames))
        return Video(frames, 15)

    monkeypatch.setattr(pipe, "generate", generate)
    return alive


def all_frames(video: LongVideo) -> np.ndarray:
    return np.stack(list(video.pixels()))


def file_frames(video: LongVideo, number: int) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(video.folder / f"{number:03}.safetensors")["frames"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_after(count: int):
    """A callback that fails once so many segments are finished."""

    def on_segment(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return on_segment


def test_frames_shared_by_segments_are_shown_once(made):
    assert made.frames == FRAMES + 2 * NEW
    assert all_frames(made).shape == made.shape == (29, 64, 96, 3)
    files = [file_frames(made, number) for number in range(3)]
    assert [frames.shape for frames in files] == [(13, 64, 96, 3)] * 3
    shown = [files[0], files[1][CLEAN:], files[2][CLEAN:]]
    assert np.array_equal(all_frames(made), np.concatenate(shown))
    assert np.array_equal(made.read(0, 29), np.concatenate(shown))
    assert np.array_equal(made.read(11, 23), all_frames(made)[11:23])


def test_the_released_setting_makes_973_frames(tmp_path):
    journal = Journal(fps=15, height=2, width=2, request={})
    with open_segments(tmp_path, journal) as folder:
        for number in range(12):
            folder.add(np.zeros((93, 2, 2, 3), np.uint8), 13 if number else 0)
    assert folder.video.frames == 973


def test_each_segment_starts_from_the_last_frames_of_the_one_before(
    pipe, made, calls, monkeypatch, tmp_path
):
    encoded, encode = [], pipe.components.encode_frames

    def watched(pixels, *rest):
        encoded.append(pixels.clone())
        return encode(pixels, *rest)

    monkeypatch.setattr(pipe.components, "encode_frames", watched)
    again = generate_long(pipe, TEXTS, tmp_path / "x", seed=3, steps=STEPS)
    assert len(encoded) == 2
    for number, pixels in enumerate(encoded):
        last = file_frames(again, number)[-CLEAN:]
        assert torch.equal(pixels, resize_video(last, 64, 96))
    assert np.array_equal(all_frames(again), all_frames(made))
    assert [call["prompt"] for call in calls] == TEXTS
    assert [call.get("task") for call in calls] == [None, "vc", "vc"]
    assert [call.get("enhance_hf") for call in calls] == [None, True, True]
    assert calls[0]["seed"] == 3
    assert len({call["seed"] for call in calls}) == 3


def test_a_segment_is_what_generate_makes(pipe, made):
    first = pipe.generate("a cat", seed=3, steps=STEPS)
    assert np.array_equal(file_frames(made, 0), truncated_uint8(first.frames))
    second = pipe.generate(
        "a dog", video=file_frames(made, 0), seed=segment_seed(3, "segment", 1), steps=STEPS
    )
    assert np.array_equal(file_frames(made, 1), truncated_uint8(second.frames))


def test_the_prompt_of_a_segment_changes_it_and_those_after(pipe, made, tmp_path):
    other = generate_long(pipe, ["a cat", "a dog", "the piano"], tmp_path, seed=3, steps=STEPS)
    same = [np.array_equal(file_frames(other, n), file_frames(made, n)) for n in range(3)]
    assert same == [True, True, False]


def test_one_prompt_serves_all_segments(pipe, fake, tmp_path):
    assert len(generate_long(pipe, "a cat", tmp_path / "a").journal.segments) == 12
    assert len(generate_long(pipe, "a cat", tmp_path / "b", segments=2).journal.segments) == 2
    assert prompts_for(["a cat"], 3) == ["a cat"] * 3


def test_the_mp4_has_every_frame(made, tmp_path):
    path = made.save(tmp_path / "x.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == made.fps
    assert len(frames) == made.frames
    with pytest.raises(ResourceError, match="will not overwrite"):
        made.save(path)


def test_a_segment_that_fails_is_made_again(pipe, made, tmp_path, monkeypatch):
    class Failure(Exception):
        pass

    def failing(event):
        if len(list(folder.glob("0*"))) == 2:
            raise Failure

    folder = tmp_path / "x"
    with pytest.raises(Failure):
        generate_long(pipe, TEXTS, folder, seed=3, steps=STEPS, on_step=failing)
    assert names(folder) == ["000.safetensors", "001.safetensors", JOURNAL]
    events = []
    again = generate_long(
        pipe, TEXTS, folder, seed=3, steps=STEPS, on_segment=lambda *event: events.append(event)
    )
    assert events == [(2, 3), (3, 3)]
    assert np.array_equal(all_frames(again), all_frames(made))


CHILD = """
import os, signal, sys
from lcexport.runtime import generate_long, load
from lcexport.runtime.segments import SegmentFolder
from lcexport.runtime import segments

bundle, folder, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
write = segments.write_journal
def killed(folder, journal):
    if len(journal.segments) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the second file is there, the journal lacks it
    write(folder, journal)
segments.write_journal = killed
with load(bundle, "tiny", "eager", tasks=()) as pipe:
    generate_long(pipe, texts, folder, seed=3, steps=2)
"""


def test_a_killed_process_is_continued(pipe, made, calls, tiny, tmp_path):
    folder = tmp_path / "x"
    command = [sys.executable, "-c", CHILD, str(tiny), str(folder), *TEXTS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(folder) == ["000.safetensors", "001.safetensors", JOURNAL]
    assert len(json.loads((folder / JOURNAL).read_text())["segments"]) == 1
    (folder / ".001.safetensors.1.partial").write_bytes(b"half")
    again = generate_long(pipe, TEXTS, folder, seed=3, steps=STEPS)
    assert [call["prompt"] for call in calls] == TEXTS[1:]
    assert np.array_equal(all_frames(again), all_frames(made))
    assert names(folder) == ["000.safetensors", "001.safetensors", "002.safetensors", JOURNAL]


def test_a_finished_video_is_not_made_again(pipe, made, calls):
    again = generate_long(pipe, TEXTS, made.folder, seed=3, steps=STEPS)
    assert calls == []
    assert again == made


def test_cancelling_keeps_what_is_finished(pipe, fake, tmp_path):
    token = CancelToken()

    def cancel_at_two(done, total):
        if done == 2:
            token.cancel()

    with pytest.raises(Cancelled):
        generate_long(pipe, TEXTS, tmp_path, on_segment=cancel_at_two, cancel=token)
    assert names(tmp_path) == ["000.safetensors", "001.safetensors", JOURNAL]


@pytest.mark.parametrize("uint8", [True, False])
def test_no_more_than_one_segment_is_in_memory(pipe, fake, tmp_path, uint8, monkeypatch):
    monkeypatch.setattr(pipe.components, "encode_frames", lambda pixels, *_: pixels)
    video = generate_long(pipe, "a cat", tmp_path, segments=11, uint8=uint8)
    gc.collect()
    assert len(fake) == 11
    assert [frames() for frames in fake] == [None] * 11
    alive: list[weakref.ref] = []
    for frame in video.pixels():
        assert frame.base is None or frame.base.nbytes == frame.nbytes  # no view of a segment
        alive.append(weakref.ref(frame))
        assert sum(frame() is not None for frame in alive) <= 2
    assert len(alive) == FRAMES + 10 * NEW


def test_an_image_comes_first(pipe, calls, clip, tmp_path):
    video = generate_long(pipe, "a cat", tmp_path, segments=2, image=clip[0], steps=STEPS)
    assert np.array_equal(calls[0]["image"], clip[0])
    assert "image" not in calls[1]
    alone = pipe.generate("a cat", image=clip[0], steps=STEPS)
    assert np.array_equal(file_frames(video, 0), truncated_uint8(alone.frames))


def test_a_given_video_is_the_beginning(pipe, calls, clip, tmp_path):
    large = clip.repeat(2, axis=1).repeat(2, axis=2)
    video = generate_long(pipe, ["a cat", "a dog"], tmp_path, video=large, steps=STEPS)
    assert video.frames == 7 + 2 * NEW
    assert [call["task"] for call in calls] == ["vc", "vc"]
    begin = resize_video(large, 64, 96)  # as `generate` would
    assert torch.equal(resize_video(video.read(0, 7), 64, 96), begin)
    assert torch.equal(resize_video(calls[0]["video"], 64, 96), begin[:, :, -CLEAN:])
    alone = pipe.generate("a cat", video=large, steps=STEPS)
    assert np.array_equal(file_frames(video, 1), truncated_uint8(alone.frames))


def test_frames_can_be_handed_on_unrounded(pipe, made, calls, tmp_path):
    options: dict[str, Any] = {"segments": 2, "seed": 3, "steps": STEPS}
    exact = generate_long(pipe, "a cat", tmp_path / "a", uint8=False, **options)
    rounded = generate_long(pipe, "a cat", tmp_path / "b", **options)
    first, second = (file_frames(exact, number) for number in range(2))
    assert first.dtype == np.float32
    assert np.array_equal((first * 255).astype(np.uint8), file_frames(rounded, 0))
    # the same random numbers: they differ by what rounding changes, and do differ
    difference = np.abs(second - file_frames(rounded, 1) / 255)[CLEAN:].mean()
    other = np.abs(second - file_frames(made, 1) / 255)[CLEAN:].mean()
    assert 0 < difference < 0.1
    assert difference < other
    assert torch.equal(
        torch.from_numpy(all_frames(exact)[:FRAMES]),
        torch.from_numpy(Video(torch.from_numpy(first), 15).to_uint8()),
    )


def test_an_unrounded_video_continues_too(pipe, tmp_path):
    options: dict[str, Any] = {"segments": 2, "steps": STEPS, "uint8": False}
    whole = generate_long(pipe, "a cat", tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        generate_long(pipe, "a cat", tmp_path / "b", on_segment=stop_after(1), **options)
    again = generate_long(pipe, "a cat", tmp_path / "b", **options)
    assert np.array_equal(file_frames(again, 1), file_frames(whole, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments is out of range; got 0"),
        ({"prompts": ["a", "b"], "segments": 3}, "got 2 prompts for 3 segments"),
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": ["a", " "]}, "prompt 2 of 2 is empty"),
        ({"seed": -1}, "seed is out of range"),
        ({"steps": 0}, "steps is out of range"),
        ({"distill": True, "enhance_hf": True}, "two schedules"),
        ({"image": "x.png", "video": "x.mp4"}, "an image and a video"),
        ({"video": np.zeros((4, 64, 96, 3), np.uint8)}, "too short to continue; got 4 frames"),
    ],
)
def test_what_cannot_be_asked(pipe, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        generate_long(pipe, **{"prompts": "a cat", "folder": tmp_path / "x", **options})
    assert not (tmp_path / "x").exists()


def test_a_bundle_without_continuation(bundle, fake_engine, tmp_path):
    with load(bundle, "tiny", engine=fake_engine()) as pipe:
        with pytest.raises(UsageError, match="--task vc --add"):
            generate_long(pipe, "a cat", tmp_path / "x")
        one = generate_long(pipe, "a cat", tmp_path / "x", segments=1, steps=1)
    assert one.frames == 9


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"prompts": ["a cat", "a dog", "drums"]}, "prompts"),
        ({"seed": 4}, "seed"),
        ({"steps": 3}, "steps"),
        ({"guidance_scale": 2}, "guidance_scale"),
        ({"negative_prompt": "blurry"}, "negative_prompt"),
        ({"enhance_hf": False}, "enhance_hf"),
        ({"uint8": False}, "uint8"),
        ({"image": np.zeros((64, 96, 3), np.uint8)}, "graphs, image"),
    ],
)
def test_another_request_does_not_continue(pipe, made, calls, options, differs):
    wanted = {"prompts": TEXTS, "seed": 3, "steps": STEPS, **options}
    with pytest.raises(UsageError, match=f"another request's segments: {differs} differ"):
        generate_long(pipe, folder=made.folder, **wanted)
    assert calls == []


def test_a_long_video_can_be_extended(pipe, made, calls, tmp_path):
    one = generate_long(pipe, TEXTS[:1], tmp_path, segments=1, seed=3, steps=STEPS)
    assert one.frames == FRAMES
    assert list(one.journal.request["graphs"]) == ["tiny"]
    three = generate_long(pipe, TEXTS, tmp_path, seed=3, steps=STEPS)
    assert len(calls) == 3
    assert np.array_equal(all_frames(three), all_frames(made))
    assert three.journal.request == made.journal.request


def test_prompts_of_what_is_not_finished_can_be_changed(pipe, fake, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_long(pipe, TEXTS, tmp_path, on_segment=stop_after(2))
    files = [(tmp_path / f"00{number}.safetensors").read_bytes() for number in range(2)]
    four = generate_long(pipe, [*TEXTS[:2], "drums", "rain"], tmp_path)
    assert [(tmp_path / f"00{number}.safetensors").read_bytes() for number in range(2)] == files
    assert four.frames == FRAMES + 3 * NEW
    assert len(fake) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "differs"),
    [
        (["a dog", "a cat", "rain", "drums"], {}, "prompts"),
        (TEXTS[:2], {}, "prompts"),
        ([*TEXTS, "drums"], {"seed": 4}, "seed"),
    ],
)
def test_what_is_no_extension_is_refused(pipe, fake, tmp_path, prompts, options, differs):
    generate_long(pipe, TEXTS, tmp_path)
    journal = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(UsageError, match=f"another request's segments: {differs} differ"):
        generate_long(pipe, prompts, tmp_path, **options)
    assert (tmp_path / JOURNAL).read_bytes() == journal


def test_a_refinement_is_extended_with_its_video(pipe, fake, clip, tmp_path):
    short = generate_long(pipe, "a", tmp_path / "a", segments=1, video=clip)
    refine_long(pipe, short, tmp_path / "b", seed=3)
    longer = generate_long(pipe, ["a", "b"], tmp_path / "a", video=clip)
    seen = []
    found = refine_long(
        pipe, longer, tmp_path / "b", seed=3, on_segment=lambda *event: seen.append(event)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]  # the second window had been filled up
    assert found.frames == 2 * longer.frames == 46
    fresh = refine_long(pipe, longer, tmp_path / "c", seed=3)
    assert np.array_equal(all_frames(found), all_frames(fresh))


def test_other_weights_do_not_continue(pipe, made, monkeypatch):
    files = dict(pipe.bundle.manifest.files)
    files["dit.safetensors"] = files["dit.safetensors"].model_copy(update={"sha256": "0" * 64})
    manifest = pipe.bundle.manifest.model_copy(update={"files": files})
    monkeypatch.setattr(pipe.bundle, "manifest", manifest)
    with pytest.raises(UsageError, match="weights differ"):
        generate_long(pipe, TEXTS, made.folder, seed=3, steps=STEPS)


def test_a_folder_with_other_things_is_left_alone(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds something else; got .*mine\.txt"):
        generate_long(pipe, "a cat", tmp_path)
    assert names(tmp_path) == ["mine.txt"]


def test_one_process_at_a_time(pipe, fake, tmp_path):
    def second(done, total):
        with pytest.raises(LockedError, match="another process"):
            generate_long(pipe, "a cat", tmp_path, segments=1)

    generate_long(pipe, "a cat", tmp_path, segments=1, on_segment=second)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_segment_is_not_continued(pipe, fake, tmp_path, damage):
    video = generate_long(pipe, "a cat", tmp_path, segments=2)
    path = tmp_path / "000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(IntegrityError, match=r"000\.safetensors"):
        generate_long(pipe, "a cat", tmp_path, segments=2)
    with pytest.raises(IntegrityError, match=r"000\.safetensors"):
        video.save(tmp_path / "x.mp4")
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", IntegrityError, "is not JSON"),
        ('{"schema_version": 2}', IncompatibleError, "another schema version; got 2"),
        ('{"schema_version": 1, "fps": 15}', IntegrityError, "height: Field required"),
    ],
)
def test_a_damaged_journal(pipe, tmp_path, text, error, message):
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(error, match=message):
        generate_long(pipe, "a cat", tmp_path)


def test_a_journal_names_no_file_outside_its_folder(pipe, fake, tmp_path):
    generate_long(pipe, "a cat", tmp_path, segments=1)
    text = (tmp_path / JOURNAL).read_text().replace("000.safetensors", "../000.safetensors")
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(IntegrityError, match=r"segments\.0\.file"):
        generate_long(pipe, "a cat", tmp_path, segments=1)


def test_seeds_of_segments():
    seeds = {segment_seed(0, kind, n) for kind in ("segment", "window") for n in range(1, 12)}
    assert len(seeds) == 22
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert segment_seed(7, "segment", 0) == 7
    assert segment_seed(7, "segment", 1) != segment_seed(8, "segment", 1)


def test_refinement_goes_window_by_window(pipe, made, refined, tmp_path):
    assert refined.frames == 2 * made.frames
    assert refined.shape == (58, 64, 128, 3)
    assert refined.fps == 2 * made.fps
    first = pipe.refine(made.read(0, 13), seed=3)
    assert np.array_equal(file_frames(refined, 0), truncated_uint8(first.frames))
    seed = segment_seed(3, "window", 1)
    second = pipe.refine(made.read(8, 21), seed=seed, cond_video=file_frames(refined, 0))
    assert np.array_equal(file_frames(refined, 1), truncated_uint8(second.frames))
    with av.open(str(refined.save(tmp_path / "x.mp4"))) as container:
        assert len(list(container.decode(video=0))) == 58


def test_an_interrupted_refinement_continues(pipe, made, refined, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        refine_long(pipe, made, tmp_path, seed=3, on_segment=stop_after(2))
    events = []
    again = refine_long(
        pipe, made, tmp_path, seed=3, on_segment=lambda *event: events.append(event)
    )
    assert events == [(2, 3), (3, 3)]
    assert np.array_equal(all_frames(again), all_frames(refined))


def test_refinement_may_keep_the_number_of_frames(pipe, made, tmp_path):
    found = refine_long(pipe, made, tmp_path, spatial=True)
    assert found.shape == (made.frames, 64, 128, 3)
    assert found.fps == made.fps


def test_a_short_last_window_is_filled_up(pipe, fake, clip, tmp_path):
    video = generate_long(pipe, "a cat", tmp_path / "a", segments=1, video=clip)
    assert video.frames == 15
    frames, there = window(video, NEW, FRAMES)
    assert (len(frames), there) == (13, 7)
    assert np.array_equal(frames[:7], video.read(8, 15))
    assert np.array_equal(frames[7:], np.repeat(video.read(14, 15), 6, axis=0))
    refined = refine_long(pipe, video, tmp_path / "b")
    assert refined.frames == 30
    assert len(refined.journal.segments) == 2


def test_what_cannot_be_refined(pipe, made, refined, tmp_path):
    with pytest.raises(UsageError, match="another size; got 64 x 128"):
        refine_long(pipe, refined, tmp_path)
    with pytest.raises(UsageError, match="another request's segments"):
        refine_long(pipe, made, made.folder)
    with pytest.raises(UsageError, match="another request's segments: seed differ"):
        refine_long(pipe, made, refined.folder, seed=4)
