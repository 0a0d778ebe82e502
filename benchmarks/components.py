"""What compiling the text encoder and the VAE's decoder is worth: packages against the library.

    python benchmarks/components.py [--size 128x192] [--latent-frames 3] [--layers 2] [--width 96]
                                    [--threads 1] [--rounds 5] [--json FILE]

Random float32 weights at the released widths: a text encoder of 4,096 channels and 512 tokens with
a few of its 24 layers, and the whole decoder. Both ways use one set of weights and take turns,
round after round; the first round is not counted. Times are the clock's and the processor's, the
latter for a machine that is shared; ratios are of medians.

Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lcexport.builder import BuildOptions
from lcexport.builder.components import compile_component
from lcexport.compare import difference
from lcexport.configs.components import Component, text_encoder, vae_decoder
from lcexport.configs.presets import LATENT_CHANNELS, SPATIAL_STRIDE, preset_from
from lcexport.demo import write_tokenizer
from lcexport.engines.aoti_components import ComponentPackage
from lcexport.engines.manifest import PlanRecord
from lcexport.engines.trt.reader import PlanFile
from lcexport.runtime.text import TextEncoder
from lcexport.runtime.vae import VideoVAE

TOKENS = 512
CPU = torch.device("cpu")
Run = Callable[[], torch.Tensor]


def write_components(folder: Path, layers: int, width: int) -> None:
    """A tokenizer, a text encoder of so many layers and a VAE of so many base channels."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    write_tokenizer(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=256, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    AutoencoderKLWan(base_dim=width).save_pretrained(folder / "vae")


def compiled(folder: Path, component: Component, found: dict[str, Any]) -> list[ComponentPackage]:
    """A component's packages, loaded; what compiling took goes into `found`."""
    options = BuildOptions(
        model=folder, output=folder / "bundle", presets=(preset_from("demo"),),
        backends=("aotinductor",), compile_components=True,
    )  # fmt: skip
    packages = []
    for part in component.parts:
        started = time.perf_counter()
        made = compile_component(folder, component, part, options)
        (name, file), *_ = made.files.items()
        found[part] = {"compile_s": time.perf_counter() - started, "bytes": file.bytes}
        plan = PlanRecord.model_validate(made.facts["plan"])
        packages.append(
            ComponentPackage(plan, PlanFile(folder / name, file.bytes, file.sha256), CPU, "")
        )
    return packages


def compared(ways: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Both ways by turns: medians, their ratios, and how far apart they are."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    outputs = {}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            begin = time.perf_counter(), time.process_time()
            outputs[name] = run()
            spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
            seconds[name].append(spent)
    rows: dict[str, Any] = {}
    for name, found in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*found[1:], strict=True))
        rows[name] = {"seconds": wall, "processor_seconds": processor}
    library, package = rows["library"], rows["compiled"]
    ratios = {key: package[key] / library[key] for key in ("seconds", "processor_seconds")}
    apart = difference(outputs["compiled"], outputs["library"])
    return {"ways": rows, "compiled_over_library": ratios, "relative_l2": apart.relative_l2}


def frames_of(vae: VideoVAE, latents: torch.Tensor) -> torch.Tensor:
    """The last group of frames; the others are dropped as they come."""
    last = torch.empty(0)
    for last in vae.frames(latents):  # noqa: B007
        pass
    return last


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", default="128x192", help="HEIGHTxWIDTH in pixels (%(default)s)")
    parser.add_argument("--latent-frames", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="the encoder's (%(default)s)")
    parser.add_argument("--width", type=int, default=96, help="the VAE's (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    height, width = map(int, asked.size.split("x"))
    found: dict[str, Any] = {"packages": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_components(folder, asked.layers, asked.width)
        (package,) = compiled(folder, text_encoder(TOKENS), found["packages"])
        encoder = TextEncoder(folder, TOKENS)
        tokens = encoder.tokens("a red circle moves left and a blue square moves right. " * 20)
        ways: dict[str, Run] = {
            "library": lambda: encoder.encode_ids(*tokens).embeds,
            "compiled": lambda: encoder.by(package).encode_ids(*tokens).embeds,
        }
        found["text_encoder"] = compared(ways, asked.rounds)
        encoder.close()
        size = vae_decoder(height, width)
        vae = VideoVAE(folder)
        other = vae.by({size.name: compiled(folder, size, found["packages"])})
        shape = (LATENT_CHANNELS, asked.latent_frames)
        latents = torch.randn(*shape, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        ways = {
            "library": lambda: frames_of(vae, latents),
            "compiled": lambda: frames_of(other, latents),
        }
        found["vae_decoder"] = compared(ways, asked.rounds)
    show(found)
    line = json.dumps(
        {
            "schema_version": 1,
            "benchmark": "components",
            **{key: value for key, value in vars(asked).items() if key != "json"},
            "torch": torch.__version__,
            **found,
        }
    )
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(f"{'':<24}{'seconds':>9}{'processor s':>13}")
    for part in ("text_encoder", "vae_decoder"):
        for way, row in found[part]["ways"].items():
            print(f"{part + ', ' + way:<24}{row['seconds']:>9.3f}{row['processor_seconds']:>13.3f}")
        ratios = found[part]["compiled_over_library"]
        print(f"{'  compiled / library':<24}{ratios['seconds']:>9.3f}", end="")
        print(f"{ratios['processor_seconds']:>13.3f}")
    for part, cost in found["packages"].items():
        print(f"{part}.pt2: {cost['compile_s']:.0f} s, {cost['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
