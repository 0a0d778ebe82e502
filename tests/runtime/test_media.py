"""Pictures and videos from files; every damaged one is one clear error."""

import struct
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lcexport.configs.errors import InputError, ResourceError, UsageError
from lcexport.runtime import media
from lcexport.runtime.media import (
    frame_stride,
    read_image,
    read_video,
    resize_frames_bicubic,
    resize_video,
    truncated_uint8,
)

HEIGHT, WIDTH = 32, 48


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), np.uint8)


def grey_levels(count: int) -> np.ndarray:
    """`count` frames, the upper half ever lighter, the lower half black."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, : HEIGHT // 2] = np.linspace(40, 220, count).astype(np.uint8)[:, None, None, None]
    return frames


def write_video(path, frames, rate=15, form="mp4", codec="libx264", **options):
    with av.open(str(path), "w", format=form, options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def turn(path, quarters):
    """Write what a camera held sideways would: a matrix in the MP4's track header."""
    one, sine, cosine = 1 << 16, *((0, 1), (1, 0), (0, -1), (-1, 0))[quarters]
    matrix = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    start = data.index(b"tkhd") + 44  # version 0
    path.write_bytes(data[:start] + struct.pack(">9i", *matrix) + data[start + 36 :])
    return path


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_a_picture_is_read_pixel_for_pixel(tmp_path, pixels):
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert np.array_equal(image, pixels[0])
    assert np.array_equal(read_image(str(tmp_path / "a.png")), pixels[0])


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_colours_become_rgb(tmp_path, pixels, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image = Image.fromarray(pixels[0]).convert(mode)
    image.save(path)
    assert np.array_equal(read_image(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_the_cameras_orientation_is_applied(tmp_path, pixels, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels[0]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels[0], turns))


@pytest.mark.parametrize(("alpha", "words"), [(255, 0), (254, 1)])
def test_transparency_is_dropped_aloud(tmp_path, pixels, caplog, alpha, words):
    image = Image.fromarray(pixels[0]).convert("RGBA")
    image.putpixel((0, 0), (*pixels[0, 0, 0].tolist(), alpha))
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels[0])
    assert ["a.png is transparent" in record.message for record in caplog.records] == [True] * words


def test_sixteen_bits_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has too deep pixels; got I;16"):
        read_image(tmp_path / "a.png")


def test_a_saved_video_comes_back(tmp_path):
    frames = grey_levels(12)
    video, fps = read_video(write_video(tmp_path / "a.mp4", frames, rate=24))
    assert video.shape == frames.shape
    assert video.dtype == np.uint8
    assert fps == 24
    assert np.abs(video.astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    ("name", "form", "codec"), [("a.webm", "webm", "libvpx-vp9"), ("a.avi", "avi", "mpeg4")]
)
def test_other_containers(tmp_path, name, form, codec):
    path = write_video(tmp_path / name, grey_levels(6), form=form, codec=codec)
    video, fps = read_video(path)
    assert video.shape == (6, HEIGHT, WIDTH, 3)
    assert fps == 15


def test_only_every_so_many_frames_are_kept(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_levels(12), rate=60)
    every, _ = read_video(path)
    kept, fps = read_video(path, target_fps=15)
    assert fps == 60
    assert np.array_equal(kept, every[::4])


@pytest.fixture
def room(monkeypatch):
    """Memory for five frames, and so for four times as many that are copied about."""
    free = 5 * HEIGHT * WIDTH * 3 * media.COPIES
    monkeypatch.setattr(media, "available_memory_bytes", lambda: free)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("form", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_a_film_is_refused_before_it_is_decoded(tmp_path, monkeypatch, form, codec):
    path = write_video(tmp_path / "film", grey_levels(12), form=form, codec=codec)
    monkeypatch.setattr(media, "whole_frames", lambda *words: pytest.fail("a frame was decoded"))
    with pytest.raises(ResourceError, match=r"film is too long .*got 12 frames .*wanted at most"):
        read_video(path)


@pytest.mark.usefixtures("room")
def test_a_film_that_does_not_say_how_long_it_is_stops_being_read(tmp_path, monkeypatch):
    path = write_video(tmp_path / "film.mp4", grey_levels(12))
    monkeypatch.setattr(media, "foretold", lambda *words: 0)
    with pytest.raises(ResourceError, match="got 6 frames or more"):
        read_video(path)


@pytest.mark.usefixtures("room")
def test_of_a_film_its_end_can_be_had(tmp_path, monkeypatch):
    path = write_video(tmp_path / "film.mp4", grey_levels(12), rate=30)
    end, _ = read_video(path, target_fps=15, last=3)
    thin, _ = read_video(path, target_fps=10)
    assert thin.shape == (4, HEIGHT, WIDTH, 3)
    monkeypatch.undo()
    assert np.array_equal(end, read_video(path, target_fps=15)[0][-3:])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_cameras_rotation_is_applied(tmp_path, quarters):
    path = write_video(tmp_path / "a.mp4", grey_levels(3))
    level, _ = read_video(path)
    turned, _ = read_video(turn(path, quarters))
    assert np.array_equal(turned, np.rot90(level, -quarters, axes=(1, 2)))  # clockwise


@pytest.mark.parametrize(
    ("fps", "target", "stride"),
    [(15, 15, 1), (10, 15, 1), (24, 15, 2), (25, 15, 2), (29.97, 15, 2), (30, 15, 2), (60, 15, 4),
     (22, 15, 1), (23, 15, 2), (37.5, 15, 2), (30, 30, 1), (60, 30, 2), (24, 30, 1)],
)  # fmt: skip
def test_the_stride(fps, target, stride):
    assert frame_stride(fps, target) == stride


@pytest.mark.parametrize(("fps", "target"), [(0, 15), (-1, 15), (30, 0), (float("nan"), 15)])
def test_a_rate_that_is_none(fps, target):
    with pytest.raises(UsageError, match="above 0"):
        frame_stride(fps, target)


@pytest.mark.parametrize("read", [read_image, read_video])
def test_a_missing_file_and_a_folder(tmp_path, read):
    with pytest.raises(InputError, match=r"cat\.png is missing"):
        read(tmp_path / "cat.png")
    with pytest.raises(InputError, match=r"is a folder; wanted a (picture|video)"):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_image, read_video])
@pytest.mark.parametrize("content", [b"", b"hello\n" * 100, b"\x89PNG\r\n\x1a\n", bytes(4096)])
def test_a_file_of_something_else(tmp_path, read, content):
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(InputError, match=r"no usable (picture|video) in .*a\.dat"):
        read(tmp_path / "a.dat")


def test_a_video_is_no_picture_and_a_picture_no_video(tmp_path, pixels):
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="no usable video"):
        read_video(tmp_path / "a.png")
    with pytest.raises(InputError, match="no usable picture"):
        read_image(write_video(tmp_path / "a.mp4", grey_levels(3)))


def test_a_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "a.mp4", grey_levels(3))
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", "a.mp4", "#EXT-X-ENDLIST"]
    (tmp_path / "list.mp4").write_text("\n".join(lines))
    with pytest.raises(InputError, match="no usable video"):
        read_video(tmp_path / "list.mp4")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_cut_picture(tmp_path, pixels, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels[0]).save(path)
    with pytest.raises(InputError, match="no usable picture"):
        read_image(cut(path, 0.6))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
@pytest.mark.parametrize(
    "how", [{"form": "mp4"}, {"form": "mp4", "movflags": "faststart"}, {"form": "avi"}]
)
def test_a_cut_video(tmp_path, how, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(InputError, match=r"no usable video|damaged or cut short"):
        read_video(cut(write_video(tmp_path / "a.dat", noise, **how), share))


def test_a_video_of_sound_alone(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="no pictures in it"):
        read_video(tmp_path / "a.mp4")


def test_a_video_without_frames(tmp_path):
    with pytest.raises(InputError, match=r"a\.avi"):
        read_video(write_video(tmp_path / "a.avi", grey_levels(3)[:0], form="avi"))


def test_golden_picture(golden):
    case = golden("pipe_tiny_i2v")
    resized = resize_video(case["image_u8"].numpy()[None], 64, 96)[:, :, 0]
    assert resized.dtype == torch.float32
    assert torch.equal(resized, case["image_preprocessed"])


def test_a_video_is_resized_frame_by_frame(pixels):
    video = resize_video(pixels, 16, 80)
    assert video.shape == (1, 3, 5, 16, 80)
    for number, frame in enumerate(pixels):
        assert torch.equal(video[:, :, number : number + 1], resize_video(frame[None], 16, 80))


def test_a_picture_of_the_right_size_keeps_its_values(pixels):
    same = resize_video(pixels[:1], HEIGHT, WIDTH)[0, :, 0].permute(1, 2, 0)
    assert np.array_equal(truncated_uint8((same / 2 + 0.5) + 1e-4), pixels[0])


def test_frames_go_back_to_their_sources_size(pixels):
    frames = resize_frames_bicubic(pixels, 70, 100)
    expected = Image.fromarray(pixels[3]).resize((100, 70), Image.Resampling.BICUBIC)
    assert frames.shape == (5, 70, 100, 3)
    assert np.array_equal(frames[3], np.asarray(expected))
    assert np.array_equal(resize_frames_bicubic(pixels, HEIGHT, WIDTH), pixels)


@pytest.mark.parametrize("size", [(0, 10), (10, -1)])
def test_nothing_is_resized_to_nothing(pixels, size):
    with pytest.raises(UsageError, match="resize to nothing"):
        resize_video(pixels, *size)


@pytest.mark.parametrize("shape", [(4, 8, 8), (0, 8, 8, 3), (1, 8, 8, 4), (1, 0, 8, 3)])
def test_what_is_not_frames_is_refused(shape):
    with pytest.raises(UsageError, match="not frames"):
        resize_video(np.zeros(shape, np.uint8), 16, 16)
    with pytest.raises(UsageError, match="not frames; got float32"):
        resize_video(np.zeros((1, 8, 8, 3), np.float32), 16, 16)  # pyright: ignore[reportArgumentType]


def test_frames_are_handed_on_rounded_down():
    values = torch.tensor([0.0, 0.9 / 255, 1.0, 254.9 / 255, 1.5, -1.0])
    assert truncated_uint8(values).tolist() == [0, 0, 255, 254, 255, 0]
    every = torch.arange(256, dtype=torch.uint8)
    again = truncated_uint8(every.float() / 255)
    assert np.abs(again.astype(int) - every.numpy()).max() <= 1
