"""What the DiT costs with AOTInductor when its block is compiled once, and when it is unrolled.

    python benchmarks/aotinductor_parts.py [--depth 4] [--hidden 1024] [--threads 1] [--json FILE]
    python benchmarks/aotinductor_parts.py --profile

Four ways through the same float32 weights at 3,072 tokens, batch 1, held against each other:

    eager    the torch module
    whole    one package of the whole model, fed with user-managed constants
    loaders  one package of the block, opened once a layer, each with its own constants
    inputs   one package of the block, opened once, its weights handed in as inputs: the backend's

Each runs once in turn, round after round, and its time is that of the processor it used: on a
shared machine what others do counts little. With several threads, waiting for each other would
count as work: set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0 then. The ratios are of medians.
What compiling cost is that of this process and of the compilers it starts, from empty caches, after
a small program has been compiled.

--profile runs nothing of that, but one block's package, and says which kernels its time goes to:
products, attention, what Inductor made, and the rest.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C._aoti import AOTIModelPackageLoader
from torch.profiler import ProfilerActivity, profile

from lcexport.builder.aoti_worker import SETTINGS, use_folder, use_kernels
from lcexport.configs.dit import DiTConfig
from lcexport.dit import Geometry, LongCatDiT
from lcexport.engines.host import keep_freed_memory
from lcexport.graph import GraphSpec
from lcexport.graph.modules import BlockPart, EmbedPart, FinalPart, embed_tables, embedders
from lcexport.graph.programs import export_program

GEOMETRY = Geometry(1, 6, 16, 32)  # 3,072 tokens
TEXT_TOKENS = 512
SPREAD = 0.02  # of the weights
Run = Callable[[], Tensor]
# by a part of the kernels' names
KERNELS = {
    "products": "linear_pointwise",
    "attention": "_attention_",
    "Inductor's": "graph_",
    "rest": "",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=4, help="blocks (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    parser.add_argument("--profile", action="store_true", help="where a block's time goes")
    asked = parser.parse_args(arguments)
    keep_freed_memory()  # as `lcexport generate` does
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    config = DiTConfig(
        hidden_size=asked.hidden,
        num_heads=asked.hidden // 128,
        depth=asked.depth,
        text_tokens_zero_pad=True,
    )
    dit = random_dit(config)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        use_folder(Path(folder))  # no cache of an earlier run is found, and none is left
        if asked.profile and asked.json:
            parser.error("--profile prints a table: leave --json out")
        if asked.profile:
            return print_profile(block_profile(dit, Path(folder), asked.rounds))
        warm_up(Path(folder))
        ways, compiled = all_ways(dit, Path(folder))
        rows = measured(ways, asked.rounds)
    for name, row in rows.items():
        row |= compiled.get(name, {})
    print_table(rows)
    document = {
        "schema_version": 1,
        "benchmark": "aotinductor_parts",
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(asked).items() if name != "json"},
        "rows": rows,
    }
    line = json.dumps(document)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


def warm_up(folder: Path) -> None:
    """Compile something small: what is paid once a process is not the first way's alone."""
    product = torch.export.export(nn.Linear(8, 8), (torch.randn(8, 8),), strict=False)
    Package(folder / "warm_up.pt2", product)


def random_dit(config: DiTConfig) -> LongCatDiT:
    dit = LongCatDiT(config).requires_grad_(False).eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=SPREAD)
    return dit


def random_inputs(config: DiTConfig) -> dict[str, Tensor]:
    g = GEOMETRY
    shape = (1, config.in_channels, g.frames, 2 * g.rows, 2 * g.columns)
    return {
        "hidden_states": torch.randn(shape),
        "encoder_hidden_states": torch.randn(1, 1, TEXT_TOKENS, config.caption_channels),
        "timestep": torch.full((1, g.frames), 500.0),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.bool),
    }


def all_ways(dit: LongCatDiT, folder: Path) -> tuple[dict[str, Run], dict[str, dict[str, float]]]:
    """Every way through the model, and what each cost to compile."""
    config, inputs = dit.config, random_inputs(dit.config)
    given, parts = tuple(inputs.values()), part_modules(dit)
    embedded = parts["Embed"](*given)
    block = [name.removeprefix("block.") for name, _ in parts["Block"].named_parameters()]
    layers = [[dict(layer.named_parameters())[name] for name in block] for layer in dit.layers]
    whole = Package(folder / "whole.pt2", torch.export.export(dit, given, strict=False))
    embed = Package(folder / "embed.pt2", torch.export.export(parts["Embed"], given, strict=False))
    last = (embedded[0], embedded[2])
    final = Package(folder / "final.pt2", torch.export.export(parts["Final"], last, strict=False))
    alone = torch.export.export(parts["Block"], embedded, strict=False)
    loaders = Package(folder / "loaders.pt2", alone)
    spec = GraphSpec(GEOMETRY, TEXT_TOKENS, torch.float32)
    handed = Package(folder / "inputs.pt2", export_program(config, spec, "Block", block))
    for package, module in ((whole, dit), (embed, parts["Embed"]), (final, parts["Final"])):
        package.fill(dict(module.named_parameters()) | dict(module.named_buffers()))
    copies = [loaders, *(loaders.again() for _ in layers[1:])]
    for copy, weights in zip(copies, layers, strict=True):
        copy.fill({f"block.{name}": tensor for name, tensor in zip(block, weights, strict=True)})

    def through(layer: Callable[[int, Tensor, Sequence[Tensor]], Tensor]) -> Tensor:
        x, *rest = embed(given)
        for index in range(config.depth):
            x = layer(index, x, rest)
        return final((x, rest[1]))[0]

    ways: dict[str, Run] = {
        "eager": lambda: dit(**inputs),
        "whole": lambda: whole(given)[0],
        "loaders": lambda: through(lambda i, x, rest: copies[i]([x, *rest])[0]),
        "inputs": lambda: through(lambda i, x, rest: handed([x, *rest, *layers[i]])[0]),
    }
    ends = (embed, final)
    cost = {"whole": (whole,), "loaders": (loaders, *ends), "inputs": (handed, *ends)}
    return ways, {name: compile_cost(packages) for name, packages in cost.items()}


def block_profile(dit: LongCatDiT, folder: Path, rounds: int) -> dict[str, float]:
    """Processor milliseconds of one pass through the block's package, by what computes."""
    embedded = part_modules(dit)["Embed"](*random_inputs(dit.config).values())
    weights = dict(dit.layers[0].named_parameters())
    spec = GraphSpec(GEOMETRY, TEXT_TOKENS, torch.float32)
    program = export_program(dit.config, spec, "Block", list(weights))
    block = Package(folder / "block.pt2", program, {"cpp.enable_kernel_profile": True})
    given = [*embedded, *weights.values()]
    block(given)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(rounds):
            block(given)
    found = dict.fromkeys(KERNELS, 0.0)
    for event in recorded.key_averages():
        kind = next(kind for kind, part in KERNELS.items() if part in event.key)
        found[kind] += event.self_cpu_time_total / rounds / 1000
    assert all(found.values()), f"a kind of kernel goes by another name now: {found}"
    return found


def print_profile(found: Mapping[str, float]) -> int:
    total = sum(found.values())
    for kind, milliseconds in found.items():
        print(f"{kind:24} {milliseconds:8.1f} ms {milliseconds / total:6.1%}")
    return 0


def part_modules(dit: LongCatDiT) -> dict[str, nn.Module]:
    """The parts that are traced, over real weights."""
    return {
        "Embed": EmbedPart(embedders(dit), embed_tables(dit.config, GEOMETRY)),
        "Block": BlockPart(dit, GEOMETRY),
        "Final": FinalPart(dit, GEOMETRY),
    }


class Package:
    """A compiled and opened package. Its constants are not in it: `fill` hands them in."""

    def __init__(
        self,
        path: Path,
        program: torch.export.ExportedProgram,
        more: Mapping[str, object] | None = None,
    ) -> None:
        self.path = path
        use_kernels(program)
        before = processor_seconds()
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                **SETTINGS,
                "aot_inductor.package_constants_in_so": False,
                **(more or {}),
            },
        )
        self.seconds = processor_seconds() - before
        self._loader = self._open()

    def _open(self) -> AOTIModelPackageLoader:
        return AOTIModelPackageLoader(str(self.path), "model", True, 1, -1)

    def again(self) -> "Package":
        """The same package, opened once more."""
        other = object.__new__(Package)
        other.path, other.seconds, other._loader = self.path, self.seconds, self._open()
        return other

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {name: tensors[name] for name in self._loader.get_constant_fqns()}
        self._loader.load_constants(wanted, False, True, True)
        self._held = wanted

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self._loader.run(list(inputs))


def compile_cost(packages: Sequence[Package]) -> dict[str, float]:
    return {
        "compile_seconds": round(sum(package.seconds for package in packages), 1),
        "megabytes": round(sum(package.path.stat().st_size for package in packages) / 1e6, 2),
    }


def measured(ways: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Processor seconds of each way, alternating, and its largest difference from eager."""
    wanted = ways["eager"]()
    errors = {name: float((run() - wanted).abs().max()) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            before = time.process_time()
            run()
            seconds[name].append(time.process_time() - before)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "processor_seconds": round(median, 4),
            "smallest": round(min(seconds[name]), 4),
            "over_whole": round(median / medians["whole"], 4),
            "max_abs_from_eager": errors[name],
        }
        for name, median in medians.items()
    }


def processor_seconds() -> float:
    """Of this process and of the ended ones that it started."""
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'':8} {'seconds':>8} {'least':>8} {'/ whole':>8} {'max abs':>9} {'compile s':>10} MB")
    for name, row in rows.items():
        print(
            f"{name:8} {row['processor_seconds']:8.3f} {row['smallest']:8.3f} "
            f"{row['over_whole']:8.3f} {row['max_abs_from_eager']:9.1e} "
            f"{row.get('compile_seconds', 0):10.1f} {row.get('megabytes', 0):.1f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
