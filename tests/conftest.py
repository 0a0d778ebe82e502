"""Fixtures: the golden cases, tiny checkpoints, graphs and a bundle made of them."""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

import lcexport.builder
from lcexport import cli
from lcexport.builder import BuildOptions, aoti, aoti_worker, build
from lcexport.builder.aoti_worker import compile_package
from lcexport.checkpoint import open_checkpoint, read_header, write_native
from lcexport.cli.app import app
from lcexport.configs.presets import preset_from
from lcexport.demo import make_demo_checkpoint
from lcexport.dit import Geometry
from lcexport.graph import GraphSpec, onnx_from_dit, save_graph
from lcexport.graph.fused import fused_graph

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


@pytest.fixture(scope="session")
def make_weights(
    dit_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`make_weights("bf16")` is the golden DiT in a bundle's one weights file."""

    @cache
    def make(bulk: str) -> Path:
        path = tmp_path_factory.mktemp(bulk) / "dit.safetensors"
        write_native(open_checkpoint(dit_folder), path, bulk=bulk)  # pyright: ignore[reportArgumentType]
        return path

    return make


@pytest.fixture(scope="session")
def make_graph(dit_folder: Path, make_weights: Callable[[str], Path]) -> Callable[..., Path]:
    """`make_graph("bf16", cond=1)` writes a graph of the golden DiT beside its weights, once."""
    config = open_checkpoint(dit_folder).config

    @cache
    def make(
        bulk: str = "fp32",
        *,
        zero_pad: bool = True,
        batch: int = 2,
        frames: int = 3,
        cond: int = 0,
        text_tokens: int = 10,
    ) -> Path:
        weights = make_weights(bulk)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[bulk]
        spec = GraphSpec(Geometry(batch, frames, 4, 6, cond), text_tokens, dtype)
        path = weights.with_name(f"{zero_pad}-{batch}-{frames}-{cond}-{text_tokens}.onnx")
        masked = config.model_copy(update={"text_tokens_zero_pad": zero_pad})
        save_graph(onnx_from_dit(masked, spec, read_header(weights).tensors, "0"), path)
        return path

    return make


@pytest.fixture(scope="session")
def fuse(dit_folder: Path) -> Callable[[Path], Path]:
    """`fuse(graph)` writes a graph of the golden DiT as ONNX Runtime wants it on processors."""
    heads = open_checkpoint(dit_folder).config.num_heads

    @cache
    def make(graph: Path) -> Path:
        fused = graph.with_suffix(".ort.onnx")
        save_graph(fused_graph(ir.load(graph), heads), fused)
        return fused

    return make


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint: every component, small. Read only."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    make_demo_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def demo_options(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildOptions:
    """What `demo_bundle` was built with."""
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    return BuildOptions(model=demo_checkpoint, output=output, presets=(preset_from("64x96x9"),))


@pytest.fixture(scope="session")
def demo_bundle(demo_options: BuildOptions) -> Path:
    """A bundle of the demo checkpoint at 64x96x9, float32, for ONNX Runtime. Read only."""
    build(demo_options)
    return demo_options.output


@pytest.fixture(scope="session")
def two_size_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo checkpoint at 64x96x9 and 96x64x9, float32. Read only."""
    output = tmp_path_factory.mktemp("two") / "bundle"
    presets = (preset_from("64x96x9"), preset_from("96x64x9"))
    build(BuildOptions(model=demo_checkpoint, output=output, presets=presets))
    return output


@pytest.fixture(scope="session")
def long_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What long videos need, of the demo checkpoint at 64x96x13; exported only. Read only."""
    options = BuildOptions(
        model=demo_checkpoint,
        output=tmp_path_factory.mktemp("long") / "bundle",
        presets=(preset_from("64x96x13"),),
        tasks=("t2v", "vc", "refine", "refine-vc"),
        cond_frames=5,
        refine_size=(64, 128),
        only="export",
    )
    build(options)
    return options.output


@pytest.fixture(scope="session")
def build_packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[BuildOptions], Path]:
    """`build_packages(options)` is `build`, with AOTInductor in this process and its caches kept.

    A package then takes seconds: its headers are compiled once, and what two graphs have in common.
    """
    caches = tmp_path_factory.mktemp("inductor")

    def make(options: BuildOptions) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aoti, "child", lambda *_: nullcontext())
            patch.setattr(aoti, "converse", lambda *a: compile_package(a[2], b"", lambda *_: None))
            patch.setattr(aoti_worker, "use_folder", lambda folder: None)
            patch.setitem(aoti_worker.SETTINGS, "aot_inductor.precompile_headers", True)
            patch.setitem(aoti_worker.SETTINGS, "aot_inductor.compile_wrapper_opt_level", "O0")
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(caches))
            patch.setattr(tempfile, "tempdir", str(caches))
            build(options)
        return options.output

    return make


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run("build", "--res", "x")` -> (exit code, stdout, stderr) of `lcexport build --res x`."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcexport", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), streams.out, streams.err

    return call


class Taken(Exception):
    """The command line was taken, with these options."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], BuildOptions]:
    """`taken(text)`: what `lcexport build` would build, as the command line reads `text`."""

    def stop(options: BuildOptions, on_progress: object) -> None:
        raise Taken(options)

    def parse(text: str) -> BuildOptions:
        program, *words = shlex.split(text)
        assert program == "lcexport"
        with pytest.raises(Taken) as caught:
            app(words, standalone_mode=False)
        return caught.value.args[0]

    monkeypatch.setattr(lcexport.builder, "build", stop)
    return parse


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mount_disk("size=1m")` is a real file system, where this process may mount one."""
    disks: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(disks)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount command: {error}")
        if done.returncode:
            pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
        disks.append(folder)
        return folder

    yield mount
    for folder in disks:
        subprocess.run(["umount", str(folder)], check=True)
