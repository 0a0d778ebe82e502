"""One full-width layer of the DiT on this GPU: backends, FP32 islands, attention kernels.

    python benchmarks/gpu.py [--json FILE] [--tokens-preset 480p] [--device cuda]

Needs torch with CUDA and this repository's files, nothing else: no installation, no network, no
pydantic or safetensors. The layer is the project's own (`lcexport/dit/blocks.py`), with random
weights in bfloat16 and its FP32 islands in float32.

Measured, alternating between variants in every round, medians over the rounds:
    peak        TFLOP/s of a large bfloat16 matrix product: what a share below is a share of
    backends    eager, torch.compile and an AOTInductor package
    islands     each of them with the islands computed in bfloat16 instead: what FP32 costs
    attention   the self-attention of that many tokens, in each of torch's fused kernels
    parity      each variant on a small case against the same layer in float64

Prints tables and, as the last line, one JSON document.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, CALLS = 7, 3  # a variant's time in a round is the mean of its calls
PEAK_SIDE = 8192
# Latent frames, rows and columns in tokens: 93 frames of 480 x 832 and of 720 x 1280, a small one.
GRIDS = {"480p": (24, 30, 52), "720p": (24, 44, 80), "small": (2, 8, 8)}
TEXT_TOKENS = 512
NO_ISLANDS = ", no islands"
HEAD_DIM = 128
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def bare_packages() -> None:
    """Let `lcexport.dit`'s files be imported without the libraries that the layer has no use for.

    Packages without their `__init__`, and names that stand in type annotations alone.
    """
    for name in ("lcexport", "lcexport.dit", "lcexport.configs"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / name.replace(".", "/"))]
        sys.modules[name] = package
    for name, names in (
        ("lcexport.configs.dit", ("DiTConfig", "BlockSparseParams")),
        ("lcexport.configs.tasks", ("Job",)),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(dict.fromkeys(names, object))
        sys.modules[name] = module


def sources() -> Any:
    """The files of the layer, as modules of their own each time: one copy can be changed."""
    files = ("layers", "attention", "blocks")
    for name in files:
        sys.modules.pop(f"lcexport.dit.{name}", None)
    modules = {name: importlib.import_module(f"lcexport.dit.{name}") for name in files}
    return SimpleNamespace(**modules)


Shape = tuple[int, int, int]


def config(hidden: int) -> Any:
    """The released model's ratios at another width."""
    return SimpleNamespace(
        hidden_size=hidden, head_dim=HEAD_DIM, adaln_tembed_dim=hidden // 8,
        ffn_hidden=256 * -(-(8 * hidden // 3) // 256),
    )  # fmt: skip


def make_layer(dit: Any, grid: Shape, hidden: int, device: torch.device) -> "Layer":
    """A layer with random weights: bfloat16, the modulation and the norms' parameters float32."""
    torch.manual_seed(0)
    block = dit.blocks.Block(config(hidden))
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            nn.init.normal_(parameter, 1, 0.1)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, float(name == "norm_cross.weight"), 0.02)
        else:
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
        island = name.startswith(("adaln_linear_1", "norm_cross"))
        parameter.data = parameter.data.to(torch.float32 if island else torch.bfloat16)
    block = block.to(device).eval().requires_grad_(False)
    return Layer(block, dit.layers.Geometry(1, *grid))


def make_inputs(grid: Shape, hidden: int, device: str) -> list[Tensor]:
    """x [N, C], text [L, C], time [T, E], cos and sin [N, D/2]."""
    layers = sources().layers
    geometry = layers.Geometry(1, *grid)
    tables = layers.rope_axes(geometry, HEAD_DIM)
    x = torch.randn(geometry.tokens, hidden, dtype=torch.bfloat16)
    text = torch.randn(TEXT_TOKENS, hidden, dtype=torch.bfloat16)
    times = torch.randn(grid[0], hidden // 8)
    cos, sin = (layers.rope_grid(*(f(t) for t in tables)) for f in (torch.cos, torch.sin))
    return [t.to(device) for t in (x, text, times, cos, sin)]


class Layer(nn.Module):
    """The layer with its static sizes bound."""

    def __init__(self, block: nn.Module, geometry: Any) -> None:
        super().__init__()
        self.block, self.geometry = block, geometry

    def forward(self, x: Tensor, text: Tensor, times: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.block(x, text, times, cos, sin, None, self.geometry)


def without_islands() -> Any:
    """The layer with element-wise arithmetic in bfloat16: what the islands are compared with."""
    dit = sources()
    layers = dit.layers

    def modulate(x: Tensor, shift: Tensor, scale: Tensor, g: Any) -> Tensor:
        frames = (g.batch * g.frames, g.frame_tokens, x.shape[-1])
        normed = F.layer_norm(x, x.shape[-1:], None, None, layers.NORM_EPS).reshape(frames)
        shift, scale = shift.to(x.dtype), scale.to(x.dtype)
        return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).reshape(x.shape)

    def gated_add(x: Tensor, gate: Tensor, out: Tensor, g: Any) -> Tensor:
        frames = (g.batch * g.frames, g.frame_tokens, x.shape[-1])
        return x + (gate.to(x.dtype).unsqueeze(1) * out.reshape(frames)).reshape(x.shape)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        even, odd = x.reshape(batch, heads, tokens, dim // 2, 2).split([1, 1], dim=-1)
        cos, sin = cos.to(x.dtype).unsqueeze(-1), sin.to(x.dtype).unsqueeze(-1)
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    def head_norm(self: Any, x: Tensor) -> Tensor:
        power = (x.pow(2).mean(-1, keepdim=True) + layers.NORM_EPS) * self.squared_divisor
        return x * torch.rsqrt(power) * self.weight

    def affine_norm(self: Any, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, layers.NORM_EPS)

    dit.blocks.modulate, dit.blocks.gated_add = modulate, gated_add
    dit.attention.rotate = rotate
    layers.HeadNorm.forward, layers.AffineNorm.forward = head_norm, affine_norm
    return dit


Call = Callable[..., Tensor]


@torch.no_grad()
def make_variants(
    hidden: int, grid: Shape, inputs: list[Tensor], folder: Path
) -> tuple[dict[str, Call], dict[str, float]]:
    """Every backend with FP32 islands and without, each compiled and warm; and compile seconds."""
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    for suffix, dit in (("", sources()), (NO_ISLANDS, without_islands())):
        layer = make_layer(dit, grid, hidden, inputs[0].device)
        for name, make in (
            ("eager", lambda layer=layer: layer),
            ("compile", lambda layer=layer: torch.compile(layer, dynamic=False, fullgraph=True)),
            (
                "aotinductor",
                lambda layer=layer, suffix=suffix: packaged(
                    layer, inputs, folder / f"layer{len(suffix)}.pt2"
                ),
            ),
        ):
            started = time.perf_counter()
            module = make()
            module(*inputs)
            synchronize(inputs[0])
            seconds[name + suffix] = time.perf_counter() - started
            calls[name + suffix] = module
    return calls, seconds


def packaged(layer: Layer, inputs: list[Tensor], path: Path) -> Callable[..., Tensor]:
    """The layer compiled ahead of time with the settings of the project's backend.

    Its weights are constants that stay outside the package; the backend hands them in as inputs.
    """
    exported = torch.export.export(layer, tuple(inputs))
    settings = {"aot_inductor.package_constants_in_so": False, "emulate_precision_casts": True}
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(path), inductor_configs=settings
    )
    package = torch._inductor.aoti_load_package(str(path))
    weights = dict(exported.state_dict) | dict(exported.constants)
    wanted: dict[str, Any] = {name: weights[name] for name in package.get_constant_fqns()}
    package.load_constants(wanted, check_full_update=True, user_managed=True)

    def call(*given: Tensor) -> Tensor:
        assert wanted, "the package uses these tensors where they are"
        return package(*given)

    return call


def synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


@torch.no_grad()
def alternate(
    calls: dict[str, Callable[[], object]], like: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call per round: the mean over a few, one variant after the other."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(like)
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            synchronize(like)
            found[name].append((time.perf_counter() - started) / CALLS)
    return found


def block_flops(grid: Shape, hidden: int) -> int:
    """Operations of one layer, as `lcexport.flops.forward_flops` counts them."""
    tokens, wide = grid[0] * grid[1] * grid[2], config(hidden).ffn_hidden
    linear = 2 * tokens * (4 * hidden**2 + 3 * hidden * wide) + 4 * tokens * hidden**2
    modulation = 2 * grid[0] * (hidden // 8) * 6 * hidden
    cross = 4 * tokens * TEXT_TOKENS * hidden + 4 * TEXT_TOKENS * hidden**2
    return linear + modulation + cross + 4 * hidden * tokens**2


def measure_blocks(grid: Shape, hidden: int, device: str, rounds: int) -> dict[str, Any]:
    """Milliseconds, TFLOP/s and share of the matrix-product peak, per variant."""
    inputs = make_inputs(grid, hidden, device)
    side = PEAK_SIDE if device.startswith("cuda") else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        calls, seconds = make_variants(hidden, grid, inputs, Path(folder))
        timed: dict[str, Callable[[], object]] = {
            name: partial(call, *inputs) for name, call in calls.items()
        }
        found = alternate(timed | {"peak": lambda: a @ b}, inputs[0], rounds)
    peak = 2 * side**3 / statistics.median(found.pop("peak")) / 1e12
    work = block_flops(grid, hidden) / 1e12
    rows = {}
    for name, times in found.items():
        median = statistics.median(times)
        rows[name] = {
            "ms": median * 1e3, "ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3,
            "tflops": work / median, "share_of_peak": work / median / peak,
            "first_call_s": seconds[name],
        }  # fmt: skip
    cost = {
        name: rows[name]["ms"] / rows[name + NO_ISLANDS]["ms"] - 1
        for name in ("eager", "compile", "aotinductor")
    }
    return {"peak_tflops": peak, "tflop": work, "variants": rows, "cost_of_islands": cost}


def measure_attention(grid: Shape, heads: int, device: str, rounds: int) -> dict[str, Any]:
    """TFLOP/s of the fused kernels on q, k and v of [1, A, N, D] in bfloat16; or why not."""
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (
        torch.randn(1, heads, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    calls: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name, backend in KERNELS.items():

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=1.0)

        try:
            call()
            calls[name] = call
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    work = 4 * heads * HEAD_DIM * tokens**2 / 1e12
    found = alternate(calls, q, rounds)
    rows = {name: statistics.median(times) for name, times in found.items()}
    return {
        "tokens": tokens, "heads": heads, "refused": refused,
        "kernels": {name: {"ms": s * 1e3, "tflops": work / s} for name, s in rows.items()},
    }  # fmt: skip


@torch.no_grad()
def measure_parity(device: str) -> dict[str, float]:
    """Relative L2 distance of each variant from float64, at 256 channels and 128 tokens."""
    hidden, grid = 256, GRIDS["small"]
    inputs = make_inputs(grid, hidden, device)
    with tempfile.TemporaryDirectory() as folder:
        calls, _ = make_variants(hidden, grid, inputs, Path(folder))
        made = {name: call(*inputs).double() for name, call in calls.items()}
    layer = make_layer(sources(), grid, hidden, inputs[0].device).double()
    # In float64 the casts to float32 would be the only ones left to round.
    with mock.patch.object(Tensor, "float", Tensor.double):
        exact = layer(*(t.double() for t in inputs))
    return {name: ((out - exact).norm() / exact.norm()).item() for name, out in made.items()}


def environment(device: str) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver_cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def show(report: dict[str, Any]) -> None:
    block = report["block"]
    print(f"{report['environment']['device']}: matrix product {block['peak_tflops']:.1f} TFLOP/s")
    print(f"\n{'one layer, ' + report['grid']:<26}{'ms':>9}{'TFLOP/s':>10}{'of peak':>9}")
    for name, row in block["variants"].items():
        share = f"{row['share_of_peak']:.2f}"
        print(f"{name:<26}{row['ms']:>9.2f}{row['tflops']:>10.2f}{share:>9}")
    for name, cost in block["cost_of_islands"].items():
        print(f"FP32 islands cost {name} {100 * cost:+.1f}%")
    print(f"\n{'self-attention':<26}{'ms':>9}{'TFLOP/s':>10}")
    for name, row in report["attention"]["kernels"].items():
        print(f"{name:<26}{row['ms']:>9.2f}{row['tflops']:>10.2f}")
    for name, why in report["attention"]["refused"].items():
        print(f"{name:<26}{why}")
    print(f"\n{'relative L2 from float64':<26}")
    for name, distance in report["parity"].items():
        print(f"{name:<26}{distance:>9.1e}")


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # every first call compiles
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens-preset", choices=GRIDS, default="480p")
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 1024")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the JSON document here too; a new file")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch sees no CUDA device: use a machine with one, or --device cpu", file=sys.stderr)
        return 5
    if asked.json and asked.json.exists():
        print(f"{asked.json} exists: name a new file", file=sys.stderr)
        return 4
    grid = GRIDS[asked.tokens_preset]
    torch.manual_seed(1)
    heads = asked.hidden // HEAD_DIM
    bare_packages()
    report = {
        "schema_version": 1,
        "benchmark": "gpu",
        "grid": f"{asked.tokens_preset}, {grid[0] * grid[1] * grid[2]} tokens",
        "hidden": asked.hidden,
        "environment": environment(asked.device),
        "block": measure_blocks(grid, asked.hidden, asked.device, asked.rounds),
        "attention": measure_attention(grid, heads, asked.device, asked.rounds),
        "parity": measure_parity(asked.device),
    }
    show(report)
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
