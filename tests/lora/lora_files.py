"""LoRAs made to order, the golden ones, and digests of a folder."""

import hashlib
import json
from pathlib import Path

import torch

from lcexport.configs.dit import DiTConfig
from lcexport.demo import CONFIG
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
