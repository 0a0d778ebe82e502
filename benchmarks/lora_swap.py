"""What it costs, in seconds, to exchange the LoRAs of a bundle or of an open engine.

    python benchmarks/lora_swap.py [--small]

A bundle of the demo's size and one of hidden size 1024 and 4 blocks (--small: the first alone),
with random weights, float32, and a LoRA of rank 128 over every Linear of the blocks, on a
processor.

    bake            the new weights file, without and with golden outputs, hashing the base included
    remove          the base's weights back
    ort open        what ONNX Runtime needs after a bake: a session on the new file
    merge           the merged tensors in memory, for an engine that is open
    eager in place  copying them over an open module's parameters; back to the base is the same copy
    build           a bundle built with the LoRA in it, without golden outputs

The last line is one JSON document. TensorRT's refit is not measured here: it needs a GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lcexport import demo
from lcexport.builder import build, options_from
from lcexport.configs.dit import DiTConfig
from lcexport.eager import dit_from_files
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.host import peak_rss_bytes, reset_peak_rss
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS
from lcexport.engines.trt.refit import overwrite
from lcexport.lora import LoraChoice, bake, open_merge, remove, swapped
from lcexport.lora.file import DOT, PREFIX, linears

SIZE = "64x96x9"
RANK = 128
WIDE = {"hidden_size": 1024, "num_heads": 8}
BLOCKS = {"attn.qkv": 3, "cross_attn.kv_linear": 2}


def write_lora(path: Path, config: DiTConfig) -> None:
    """A LoRA over every Linear of the blocks, bfloat16."""
    tensors = {}
    for name, pair in linears(config).items():
        if not name.startswith("blocks."):
            continue
        out, width = pair.shape
        count = BLOCKS.get(name.split(".", 2)[2], 1)
        key = PREFIX + name.replace(".", DOT)
        tensors[f"{key}.lora_down.weight"] = torch.randn(count * RANK, width).bfloat16() / 64
        for j in range(count):
            up = "lora_up.weight" if count == 1 else f"lora_up.blocks.{j}.weight"
            tensors[f"{key}.{up}"] = torch.randn(out // count, RANK).bfloat16() / 64
        tensors[f"{key}.alpha_scale"] = torch.tensor(0.5)
    save_file(tensors, path)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 2)


def measure(folder: Path, config: DiTConfig) -> dict[str, float]:
    """Every row, for a DiT of this size."""
    folder.mkdir()
    demo.CONFIG = config
    demo.make_demo_checkpoint(folder / "ck")
    lora = folder / "lora.safetensors"
    write_lora(lora, config)
    choices = [LoraChoice(path=lora)]
    bundle = folder / "bundle"
    build(options_from(model=folder / "ck", res=SIZE, output=bundle))
    base = load_file(bundle / WEIGHTS)
    rows: dict[str, float] = {
        "weights_mb": round((bundle / WEIGHTS).stat().st_size / 1e6),
        "lora_mb": round(lora.stat().st_size / 1e6),
    }
    reset_peak_rss()
    before = peak_rss_bytes()
    rows["bake"] = seconds(lambda: bake(bundle, choices, golden=False))
    rows["bake_extra_mb"] = round((peak_rss_bytes() - before) / 1e6)
    rows["ort open"] = seconds(
        lambda: open_engine("onnxruntime", open_bundle(bundle), SIZE).close()
    )
    rows["remove"] = seconds(lambda: remove(bundle))
    rows["bake with golden"] = seconds(lambda: bake(bundle, choices))
    remove(bundle)
    merge = open_merge(choices, config)
    merged: dict[str, torch.Tensor] = {}
    rows["merge"] = seconds(lambda: merged.update(swapped(base, merge)))
    opened = open_bundle(bundle)
    dit = dit_from_files(opened.path(DIT_CONFIG), opened.path(WEIGHTS))
    own = dict(dit.named_parameters())
    rows["eager in place"] = seconds(lambda: overwrite(own, merged))
    rows["eager back"] = seconds(lambda: overwrite(own, base))
    words = {"model": folder / "ck", "res": SIZE, "only": "export"}
    built = folder / "built"
    rows["build"] = seconds(lambda: build(options_from(**words, output=built, loras=[str(lora)])))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that an exchange of LoRAs takes.")
    parser.add_argument("--small", action="store_true", help="the demo's size alone")
    small = parser.parse_args().small
    sizes = {"demo": demo.CONFIG}
    if not small:
        sizes["wide"] = demo.CONFIG.model_copy(update=WIDE)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, config in sizes.items():
            found[name] = measure(Path(place) / name, config)
            print(f"{name}: hidden {config.hidden_size}, {config.depth} blocks")
            for row, value in found[name].items():
                print(f"  {row:20} {value:8g}")
    print(json.dumps({"threads": torch.get_num_threads(), "seconds": found}))


if __name__ == "__main__":
    main()
