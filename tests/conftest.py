"""Fixtures: the golden cases, and a tiny checkpoint in the released folder layout."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden case: `case["name"]` is a tensor, `case.meta` the description of the case."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    meta: dict

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def load_golden(name: str) -> Golden:
    folder = GOLDEN / name
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    return Golden(folder, load_file(folder / "data.safetensors"), meta)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """`golden("cfg_zero")` loads that case, made by running the original code."""
    return load_golden


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden DiT in the released layout's `dit/` form: original names, one file."""
    folder = tmp_path_factory.mktemp("golden") / "dit"
    folder.mkdir()
    case = GOLDEN / "dit_tiny_t2v"
    shutil.copy(case / "config.json", folder / "config.json")
    shutil.copy(case / "transformer.safetensors", folder / "diffusion_pytorch_model.safetensors")
    return folder
