"""Peak memory and time of decoding, as frames come and as the library does it, by video length.

    python benchmarks/vae.py [--model DIR] [--size 240x416] [--latent-frames 3,6,12] [--json FILE]

The VAE is that of a checkpoint or bundle; a freshly made demo checkpoint's, which is 16 channels
wide instead of 96, unless one is named. Each measurement is a process of its own; its peak memory
is the process's, less what it held before decoding. Frames are dropped as they come, as a video
writer would; `whole` is the library's `decode`, which gives all of them at the end.

Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lcexport.configs.presets import LATENT_CHANNELS, SPATIAL_STRIDE
from lcexport.demo import make_demo_checkpoint
from lcexport.engines.host import peak_rss_bytes, reset_peak_rss, resident_bytes
from lcexport.runtime.vae import VideoVAE

WAYS = ("frames", "whole", "tiles")


def measure(model: Path, way: str, frames: int, height: int, width: int) -> dict[str, Any]:
    """Decode random latents once; what it took."""
    vae = VideoVAE(model, tiling=way == "tiles")
    shape = (LATENT_CHANNELS, frames, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in vae.frames(latents[:, :1]):  # what is set up once is not the decoding's
        pass
    before, started, first = resident_bytes(), time.perf_counter(), None
    reset_peak_rss()
    if way == "whole":
        with torch.no_grad():
            vae._opened().decode(latents[None], return_dict=False)
    else:
        for _ in vae.frames(latents):
            first = first or time.perf_counter() - started
    seconds = time.perf_counter() - started
    return {
        "way": way, "latent_frames": frames, "frames": 4 * (frames - 1) + 1,
        "peak_bytes": peak_rss_bytes() - before,
        "seconds": seconds, "first_frame_s": first or seconds,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a folder with vae/; a demo one if not given")
    parser.add_argument("--size", default="240x416", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--latent-frames", default="3,6,12,24")
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    asked = parser.parse_args(arguments)
    height, width = map(int, asked.size.split("x"))
    if asked.one:
        way, frames = asked.one.split(":")
        print(json.dumps(measure(asked.model, way, int(frames), height, width)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or Path(folder) / "demo"
        if asked.model is None:
            make_demo_checkpoint(model)
        found = []
        for frames in asked.latent_frames.split(","):
            for way in WAYS:
                command = [sys.executable, __file__, "--model", str(model), "--size", asked.size]
                command += ["--one", f"{way}:{frames}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':<8}{'latent frames':>14}{'peak MB':>10}{'seconds':>9}{'first frame':>13}")
    for row in found:
        print(
            f"{row['way']:<8}{row['latent_frames']:>14}{row['peak_bytes'] / 1e6:>10.0f}"
            f"{row['seconds']:>9.2f}{row['first_frame_s']:>13.2f}"
        )
    line = json.dumps(
        {
            "schema_version": 1,
            "benchmark": "vae",
            "size": asked.size,
            "model": "demo checkpoint" if asked.model is None else asked.model.name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rows": found,
        }
    )
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
