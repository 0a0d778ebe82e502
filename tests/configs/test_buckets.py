"""The sizes that given pictures are stretched to."""

import pytest

from lcexport.configs.buckets import BUCKETS, bucket
from lcexport.configs.errors import UsageError

TABLES = [(resolution, scale) for resolution, tables in BUCKETS.items() for scale in tables]


@pytest.mark.parametrize(
    ("resolution", "scale", "count"),
    [
        ("480p", 16, 26), ("480p", 64, 15), ("480p", 128, 11), ("480p", 256, 9),
        ("720p", 16, 31), ("720p", 64, 21), ("720p", 128, 17), ("720p", 256, 5),
    ],
)  # fmt: skip
def test_the_tables_are_complete(resolution, scale, count):
    assert len(BUCKETS[resolution][scale]) == count


@pytest.mark.parametrize(("resolution", "scale"), TABLES)
def test_every_size_divides_by_its_scale_and_is_near_its_key(resolution, scale):
    for label, (height, width) in BUCKETS[resolution][scale].items():
        assert height % scale == width % scale == 0
        assert height / width == pytest.approx(label, abs=0.02)


@pytest.mark.parametrize(("resolution", "scale"), TABLES)
def test_keys_ascend_so_the_smaller_wins_a_tie(resolution, scale):
    labels = list(BUCKETS[resolution][scale])
    assert labels == sorted(labels)


@pytest.mark.parametrize(("resolution", "scale"), TABLES)
def test_a_key_finds_its_own_size(resolution, scale):
    for label, size in BUCKETS[resolution][scale].items():
        assert bucket(resolution, round(label * 100), 100, scale) == size


@pytest.mark.parametrize(
    ("resolution", "height", "width", "scale", "size"),
    [
        ("480p", 480, 832, 16, (480, 832)),
        ("480p", 832, 480, 16, (832, 480)),
        ("480p", 1080, 1920, 16, (480, 832)),
        ("480p", 70, 100, 16, (512, 768)),
        ("480p", 480, 832, 32, (480, 832)),
        ("720p", 1080, 1920, 16, (704, 1312)),
        ("720p", 480, 832, 64, (704, 1280)),
        ("720p", 832, 480, 64, (1280, 704)),
    ],
)
def test_the_nearest_bucket(resolution, height, width, scale, size):
    assert bucket(resolution, height, width, scale) == size


@pytest.mark.parametrize(
    ("scale", "height", "width", "size"),
    [(128, 5, 4, (640, 640)), (256, 7, 4, (768, 512)), (256, 7, 2, (768, 256))],
)
def test_the_first_wins_a_tie(scale, height, width, size):
    nearest, next_one = sorted(abs(key - height / width) for key in BUCKETS["480p"][scale])[:2]
    assert nearest == next_one
    assert bucket("480p", height, width, scale) == size


@pytest.mark.parametrize(("resolution", "scale"), TABLES)
def test_extremes_get_the_outermost_buckets(resolution, scale):
    sizes = list(BUCKETS[resolution][scale].values())
    assert bucket(resolution, 1, 10_000, scale) == sizes[0]
    assert bucket(resolution, 10_000, 1, scale) == sizes[-1]


@pytest.mark.parametrize("scale", [0, 8, 48, 512])
def test_another_scale_is_refused(scale):
    with pytest.raises(UsageError, match=rf"got {scale}; wanted one of 16, 32, 64, 128, 256"):
        bucket("480p", 480, 832, scale)


def test_another_resolution_is_refused():
    with pytest.raises(UsageError, match=r"got '1080p'; wanted one of 480p, 720p"):
        bucket("1080p", 480, 832)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_without_pixels_is_refused(height, width):
    with pytest.raises(UsageError, match="without pixels"):
        bucket("480p", height, width)
