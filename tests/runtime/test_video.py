"""Videos in memory, as a file, as a contact sheet."""

import av
import numpy as np
import pytest
import torch

from lcexport.configs.errors import ResourceError, UsageError
from lcexport.runtime import Video, save_frames
from lcexport.runtime.video import draw_sheet, evenly_spaced


def make_video(frames: int = 9, height: int = 32, width: int = 48, fps: float = 8) -> Video:
    ramp = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    colour = np.array([1.0, 0.5, 0.25], dtype=np.float32)
    pixels = np.broadcast_to(ramp * colour, (frames, height, width, 3)).copy()
    return Video(torch.from_numpy(pixels), fps, seed=1)


def read_back(path) -> tuple[list[np.ndarray], "av.VideoStream"]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream


def test_to_uint8_rounds_to_nearest():
    values = [0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.5, -1.0]
    video = Video(torch.tensor(values).reshape(1, 1, 2, 3), 8)
    assert video.to_uint8().dtype == np.uint8
    assert video.to_uint8().ravel().tolist() == [0, 0, 1, 255, 255, 0]


def test_a_saved_video_comes_back(tmp_path):
    video = make_video()
    path = video.save(tmp_path / "cat.mp4")
    frames, stream = read_back(path)
    assert len(frames) == 9
    assert stream.average_rate == 8
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert int(stream.codec_context.colorspace) == 1  # BT.709
    error = np.abs(np.stack(frames).astype(int) - video.to_uint8())
    assert error.max() <= 6
    assert [p.name for p in tmp_path.iterdir()] == ["cat.mp4"]


def test_frames_that_are_uint8_already_are_written_as_they_are(tmp_path):
    grey = torch.full((3, 32, 48, 3), 100, dtype=torch.uint8)
    frames, _ = read_back(Video(grey, 8).save(tmp_path / "a.mp4"))
    assert np.abs(np.stack(frames).astype(int) - 100).max() <= 3


def test_frames_are_written_as_they_come(tmp_path):
    video = make_video()
    written = []

    def groups():
        for frames in (video.frames[:1], video.frames[1:5], video.frames[5:]):
            written.append(len(list(tmp_path.iterdir())))
            yield frames

    streamed = save_frames(groups(), tmp_path / "streamed.mp4", video.fps)
    assert written == [0, 1, 1], "later frames are made when the file is begun"
    whole = video.save(tmp_path / "whole.mp4")
    assert streamed.read_bytes() == whole.read_bytes()


def test_frames_that_fail_leave_no_file(tmp_path):
    def groups():
        yield make_video().frames
        raise RuntimeError("the decoder broke")

    with pytest.raises(RuntimeError, match="the decoder broke"):
        save_frames(groups(), tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("groups", [[], [torch.zeros(0, 32, 48, 3)]])
def test_a_video_needs_a_frame(tmp_path, groups):
    with pytest.raises(UsageError, match="needs a frame"):
        save_frames(groups, tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


def test_one_frame_and_a_fractional_rate(tmp_path):
    frames, stream = read_back(make_video(frames=1, fps=29.97).save(tmp_path / "a.MP4"))
    assert len(frames) == 1
    assert stream.average_rate is not None
    assert abs(float(stream.average_rate) - 29.97) < 1e-3


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "cat.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(ResourceError, match="will not overwrite"):
        make_video().save(path)
    assert path.read_bytes() == b"mine"


def test_a_failed_save_leaves_nothing(tmp_path):
    video = Video(torch.zeros(2, 0, 0, 3), 8)
    with pytest.raises(Exception):  # noqa: B017  the encoder's own error
        video.save(tmp_path / "cat.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cat.avi", "cat", "cat.mp4.txt"])
def test_an_unknown_suffix(tmp_path, name):
    with pytest.raises(UsageError, match=r"wanted something\.mp4"):
        make_video().save(tmp_path / name)


def test_a_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        make_video().save(tmp_path / "nowhere" / "cat.mp4")


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="33 x 48"):
        make_video(height=33).save(tmp_path / "cat.mp4")


def test_contact_sheet():
    sheet = make_video(height=32, width=80).contact_sheet(columns=4, count=8)
    assert sheet.size == (4 * (80 + 6) + 6, 2 * (32 + 16 + 6) + 6)
    assert sheet.getpixel((10, 10)) == (0, 0, 0)  # the first frame
    assert sheet.getpixel((3 * 86 + 10, 54 + 10)) == (255, 128, 64)  # the last


def test_contact_sheet_shows_small_frames_at_twice_their_size():
    sheet = make_video(frames=2, height=32, width=64).contact_sheet()
    assert sheet.size == (2 * (128 + 6) + 6, 64 + 16 + 6 + 6)


def test_contact_sheet_shrinks_large_frames_and_repeats_none():
    sheet = make_video(frames=2, height=480, width=640).contact_sheet()
    assert sheet.size == (2 * 326 + 6, 240 + 16 + 6 + 6)


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"count": 0}])
def test_contact_sheet_needs_a_frame(arguments):
    with pytest.raises(UsageError, match="contact sheet"):
        make_video().contact_sheet(**arguments)


def test_rows_of_a_contact_sheet_may_differ_in_size_and_number():
    frames = make_video(frames=5, height=32, width=80).to_uint8()
    wide = make_video(frames=2, height=20, width=100).to_uint8()
    rows = [evenly_spaced(frames, 8, 3, "first"), evenly_spaced(wide, 8, 6, "second")]
    assert [row.labels for row in rows] == [["0.00 s", "0.25 s", "0.50 s"], ["0.00 s", "0.12 s"]]
    sheet = draw_sheet(rows)
    assert sheet.size == (3 * (80 + 6) + 6, (32 + 32 + 6) + (20 + 32 + 6) + 6)
    titles = [np.asarray(sheet)[y : y + 16, 6:60] for y in (6, 76)]
    assert [title.min() < 100 for title in titles] == [True, True]  # something is written there
    assert not np.array_equal(titles[0], titles[1])
    assert sheet.getpixel((6 + 106 + 50, 76 + 16 + 10)) == (255, 128, 64)  # the last picture
