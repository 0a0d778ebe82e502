"""Checkpoints made from the golden weights: any dtype, any sharding, any fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.engines.manifest import COMPONENTS

Tensors = dict[str, torch.Tensor]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="session")
def weights(dit_folder: Path) -> Tensors:
    """The golden weights under their original names, BF16. Copy the dict before changing it."""
    return load_file(dit_folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def fp32_weights(weights: Tensors) -> Tensors:
    """FP32 weights that BF16 cannot hold, so that every rounding shows."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: value.float() * (1 + 1e-3 * torch.rand(value.shape, generator=generator))
        for name, value in weights.items()
    }


@pytest.fixture
def make_dit(tmp_path: Path, dit_folder: Path) -> Callable[..., Path]:
    """`make_dit(tensors, shards=2, config={"depth": 4})` writes a bare DiT folder."""
    made = 0

    def make(
        tensors: Tensors, *, shards: int = 1, config: dict | None = None, folder: Path | None = None
    ) -> Path:
        nonlocal made
        made += 1
        folder = folder or tmp_path / f"dit{made}"
        folder.mkdir(parents=True)
        content = json.loads((dit_folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(content))
        if shards == 1:
            save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        else:
            write_shards(folder, tensors, shards)
        return folder

    return make


@pytest.fixture
def released(
    tmp_path: Path, make_dit: Callable[..., Path], weights: Tensors, demo_checkpoint: Path
) -> Path:
    """A whole folder in the released layout: the golden DiT, the demo's other components."""
    folder = tmp_path / "released"
    make_dit(weights, shards=3, folder=folder / "dit")
    for name in COMPONENTS:
        shutil.copytree(demo_checkpoint / name, folder / name)
    (folder / "lora" / "inner").mkdir(parents=True)
    (folder / "lora" / "file.json").write_text("{}")
    (folder / "lora" / "inner" / "data.bin").write_bytes(b"lora" * 100)
    # a download cache keeps the files elsewhere and links to them
    target = shutil.move(folder / "vae" / "config.json", tmp_path / "blob")
    (folder / "vae" / "config.json").symlink_to(target)
    return folder


def write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    """Deal the tensors out to shards, with an index as the Hub's tools write it."""
    weight_map = {}
    for shard in range(count):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(sorted(tensors.items())[shard::count])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
