"""LoRAs of any shape, and a bundle of the golden DiT to put them into."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcexport.builder import BuildOptions, build
from lcexport.configs import preset_from
from lcexport.configs.dit import DiTConfig
from lcexport.demo import CONFIG
from lcexport.engines.bundle import COMPONENTS
from lcexport.lora.file import linears

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_tiny"
LORA_A, LORA_B = GOLDEN / "lora_a.safetensors", GOLDEN / "lora_b.safetensors"
SIZE = "64x96x9"
Tensors = dict[str, torch.Tensor]
BLOCKS = {"attn.qkv": 3, "cross_attn.kv_linear": 2}


def key_of(module: str, parameter: str) -> str:
    """The key of a module's tensor, as the original writes it."""
    hyphen = "___lorahyphen___"
    return f"lora{hyphen}{module.replace('.', hyphen)}.{parameter}"


def lora_tensors(
    config: DiTConfig = CONFIG, modules: tuple[str, ...] | None = None, rank: int = 4, seed: int = 0
) -> Tensors:
    """A LoRA for these modules, or for every Linear, whose change is as large as a weight's."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, pair in linears(config).items():
        if modules is not None and name not in modules:
            continue
        out, width = pair.shape
        count = next((n for end, n in BLOCKS.items() if name.endswith(end)), 1)
        down = torch.randn(count * rank, width, generator=generator) / width**0.5
        tensors[key_of(name, "lora_down.weight")] = down
        for j in range(count):
            up = torch.randn(out // count, rank, generator=generator) / rank**0.5
            parameter = "lora_up.weight" if count == 1 else f"lora_up.blocks.{j}.weight"
            tensors[key_of(name, parameter)] = up
        tensors[key_of(name, "alpha_scale")] = torch.tensor(0.5)
    return tensors


@pytest.fixture
def make_lora(tmp_path: Path) -> Callable[..., Path]:
    """`make_lora(modules=("blocks.0.ffn.w1",), seed=2)` writes a file for the demo's DiT."""

    def make(tensors: Tensors | None = None, name: str = "some_lora", **arguments) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(lora_tensors(**arguments) if tensors is None else tensors, path)
        return path

    return make


@pytest.fixture(scope="session")
def golden_checkpoint(
    dit_folder: Path, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The golden DiT with the demo's other components, and the golden LoRAs in `lora/`."""
    folder = tmp_path_factory.mktemp("released") / "golden"
    shutil.copytree(dit_folder, folder / "dit")
    for name in COMPONENTS:
        shutil.copytree(demo_checkpoint / name, folder / name)
    (folder / "lora").mkdir()
    shutil.copy(LORA_A, folder / "lora" / "a_lora.safetensors")
    shutil.copy(LORA_B, folder / "lora" / "b.safetensors")
    return folder


@pytest.fixture(scope="session")
def make_bundle(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`make_bundle("bf16")`: the golden DiT at the golden case's size. Read only."""
    made: dict[str, Path] = {}

    def make(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp(precision) / "bundle"
            preset = preset_from(SIZE).model_copy(update={"text_tokens": 10})
            build(
                BuildOptions(
                    model=golden_checkpoint,
                    output=made[precision],
                    presets=(preset,),
                    precision=precision,  # pyright: ignore[reportArgumentType]
                    backends=("onnxruntime",) if precision == "fp32" else ("eager",),
                )
            )
        return made[precision]

    return make


@pytest.fixture
def bundle(make_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the float32 bundle, to be changed."""
    return shutil.copytree(make_bundle("fp32"), tmp_path / "bundle")


def digests(folder: Path) -> dict[str, str]:
    """Every file below, but for what the manifest says of when it was made."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = digest(path)
    return found


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "manifest.json":
        data = json.dumps(json.loads(data), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()
