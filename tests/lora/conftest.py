"""LoRAs of any shape, and a bundle of the golden DiT to put them into."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_files import LORA_A, LORA_B, SIZE, Tensors, lora_tensors
from safetensors.torch import save_file

from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import preset_from
from lcexport.engines.manifest import COMPONENTS


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
