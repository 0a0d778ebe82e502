"""Sizes of the model's training: one per aspect ratio, resolution and spatial scale.

A given picture or video is stretched to the nearest of them. The scale is what height and width
must divide by: 16 pixels to a token, times the widest split over GPUs, times 4 for refinement
(whose sparse attention takes tokens in cubes of 4). The keys are height / width to two decimals,
as the original compares them; they are not always the exact ratio of their size.
"""

from typing import Literal

from lcexport.configs.errors import UsageError

Resolution = Literal["480p", "720p"]
Sizes = dict[float, tuple[int, int]]  # height / width -> (height, width) in pixels

FINEST_480P: Sizes = {
    0.26: (320, 1216), 0.31: (352, 1120), 0.38: (384, 1024), 0.43: (416, 960), 0.52: (448, 864),
    0.58: (480, 832), 0.67: (512, 768), 0.74: (544, 736), 0.86: (576, 672), 0.95: (608, 640),
    1.05: (640, 608), 1.17: (672, 576), 1.29: (704, 544), 1.35: (736, 544), 1.50: (768, 512),
    1.67: (800, 480), 1.73: (832, 480), 2.00: (896, 448), 2.31: (960, 416), 2.58: (992, 384),
    2.75: (1056, 384), 3.09: (1088, 352), 3.70: (1184, 320), 3.80: (1216, 320),
    3.90: (1248, 320), 4.00: (1280, 320),
}  # fmt: skip
FINEST_720P: Sizes = {
    0.25: (480, 1920), 0.29: (512, 1792), 0.32: (544, 1696), 0.36: (576, 1600),
    0.40: (608, 1504), 0.49: (672, 1376), 0.54: (704, 1312), 0.59: (736, 1248),
    0.69: (800, 1152), 0.74: (832, 1120), 0.82: (864, 1056), 0.88: (896, 1024), 0.94: (928, 992),
    1.00: (960, 960), 1.07: (992, 928), 1.14: (1024, 896), 1.22: (1056, 864), 1.31: (1088, 832),
    1.35: (1120, 832), 1.44: (1152, 800), 1.70: (1248, 736), 2.00: (1344, 672),
    2.05: (1376, 672), 2.47: (1504, 608), 2.53: (1536, 608), 2.83: (1632, 576),
    3.06: (1664, 544), 3.12: (1696, 544), 3.62: (1856, 512), 3.93: (1888, 480),
    4.00: (1920, 480),
}  # fmt: skip
BUCKETS: dict[Resolution, dict[int, Sizes]] = {
    "480p": {
        16: FINEST_480P,
        32: FINEST_480P,
        64: {
            0.26: (320, 1216), 0.38: (384, 1024), 0.50: (448, 896), 0.67: (512, 768),
            0.82: (576, 704), 1.00: (640, 640), 1.22: (704, 576), 1.50: (768, 512),
            1.86: (832, 448), 2.00: (896, 448), 2.50: (960, 384), 2.83: (1088, 384),
            3.60: (1152, 320), 3.80: (1216, 320), 4.00: (1280, 320),
        },
        128: {
            0.25: (256, 1024), 0.38: (384, 1024), 0.43: (384, 896), 0.57: (512, 896),
            0.67: (512, 768), 1.00: (640, 640), 1.50: (768, 512), 1.75: (896, 512),
            2.33: (896, 384), 2.67: (1024, 384), 4.00: (1024, 256),
        },
        256: {
            0.25: (256, 1024), 0.33: (256, 768), 0.50: (256, 512), 0.67: (512, 768),
            1.00: (512, 512), 1.50: (768, 512), 2.00: (512, 256), 3.00: (768, 256),
            4.00: (1024, 256),
        },
    },
    "720p": {
        16: FINEST_720P,
        32: FINEST_720P,
        64: {
            0.22: (448, 2048), 0.29: (512, 1792), 0.36: (576, 1600), 0.45: (640, 1408),
            0.55: (704, 1280), 0.63: (768, 1216), 0.76: (832, 1088), 0.88: (896, 1024),
            1.00: (960, 960), 1.14: (1024, 896), 1.31: (1088, 832), 1.50: (1152, 768),
            1.58: (1216, 768), 1.82: (1280, 704), 1.91: (1344, 704), 2.20: (1408, 640),
            2.30: (1472, 640), 2.67: (1536, 576), 2.89: (1664, 576), 3.62: (1856, 512),
            3.75: (1920, 512),
        },
        128: {
            0.20: (384, 1920), 0.27: (512, 1920), 0.33: (512, 1536), 0.42: (640, 1536),
            0.50: (640, 1280), 0.60: (768, 1280), 0.67: (768, 1152), 0.78: (896, 1152),
            1.00: (1024, 1024), 1.29: (1152, 896), 1.50: (1152, 768), 1.67: (1280, 768),
            2.00: (1280, 640), 2.40: (1536, 640), 3.00: (1536, 512), 3.75: (1920, 512),
            5.00: (1920, 384),
        },
        256: {
            0.33: (512, 1536), 0.60: (768, 1280), 1.00: (1024, 1024), 1.67: (1280, 768),
            3.00: (1536, 512),
        },
    },
}  # fmt: skip


def bucket(resolution: Resolution, height: int, width: int, scale: int = 16) -> tuple[int, int]:
    """(height, width) in pixels of the bucket nearest to a picture's aspect ratio.

    Nearest is the smallest |key - height / width|; the smaller key wins a tie.

    Raises:
        UsageError: no such resolution, no buckets for that scale, or an empty picture.
    """
    if (tables := BUCKETS.get(resolution)) is None:
        raise UsageError(
            "there are no buckets for that resolution",
            got=repr(resolution),
            wanted=f"one of {', '.join(BUCKETS)}",
        )
    if (sizes := tables.get(scale)) is None:
        raise UsageError(
            "there are no buckets for that scale",
            got=repr(scale),
            wanted=f"one of {', '.join(map(str, tables))}",
        )
    if height < 1 or width < 1:
        raise UsageError("a picture without pixels has no bucket", got=f"{height} x {width}")
    ratio = height / width
    return sizes[min(sizes, key=lambda label: abs(label - ratio))]
