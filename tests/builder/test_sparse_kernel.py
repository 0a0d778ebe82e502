"""`--trt sparse_kernel=plugin`: who is refused, what is compiled, and what the manifest says.

TensorRT is not here: what it would compile are plans of nothing, and no kernel runs.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcexport.builder import BuildOptions, build, sparse_kernel
from lcexport.builder import compile as compiling
from lcexport.builder import run as running
from lcexport.builder.sparse_kernel import require_sparse_kernel
from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines.trt.compile import PlanReport
from lcexport.engines.trt.network import NetworkSummary
from lcexport.engines.trt.options import TrtOptions, require_supported
from lcexport.engines.trt.product import Product
from lcexport.engines.trt.reader import Here, this_platform

PLUGIN = TrtOptions(sparse_kernel="plugin")
SPARSE = DiTConfig(text_tokens_zero_pad=True, bsa_params=BlockSparseParams())
HERE = Here("tensorrt", "11.4.0", this_platform(), "sm90", "a GPU", "13.0")
TENSORRT = Product("tensorrt", SimpleNamespace(__name__="no_such_module"), (11, 4))  # pyright: ignore[reportArgumentType]


def options_of(tmp_path: Path, **changes) -> BuildOptions:
    given = {
        "model": tmp_path / "ck", "output": tmp_path / "bundle", "backends": ("tensorrt",),
        "presets": (preset_from("64x96x5"),), "tasks": ("refine",), "refine_size": (64, 64),
        "precision": "bf16", "device": "cuda", "only": "compile", "trt": PLUGIN,
    }  # fmt: skip
    return BuildOptions.model_validate({**given, **changes})


@pytest.fixture
def with_plugins(monkeypatch):
    """A product that has ahead-of-time plugins, on a GPU."""
    for module in (sparse_kernel, compiling):
        monkeypatch.setattr(module, "open_product", lambda name: TENSORRT)
        monkeypatch.setattr(module, "read_here", lambda product, device: HERE)
    monkeypatch.setattr(sparse_kernel, "plugin_module", lambda product: object())


def require(options: BuildOptions) -> None:
    require_sparse_kernel("tensorrt", options, options.jobs(SPARSE))


def test_a_product_without_such_plugins_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_kernel, "open_product", lambda name: TENSORRT)
    with pytest.raises(IncompatibleError, match="no ahead-of-time plugins"):
        require(options_of(tmp_path))
    rtx = Product("tensorrt-rtx", TENSORRT.trt, (1, 7))
    with pytest.raises(IncompatibleError, match=r"no sparse_kernel=plugin\. Leave it out: it has"):
        require_supported(rtx, PLUGIN)
    require_supported(rtx, TrtOptions())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": ("t2v", "refine")}, "got 64x96x5. "),
        ({"dense": True}, "got 64x96x5.refine. "),
    ],
)
def test_graphs_that_are_not_sparse_are_refused_by_name(with_plugins, tmp_path, changes, named):
    with pytest.raises(UsageError) as caught:
        require(options_of(tmp_path, **changes))
    assert named in str(caught.value)
    require(options_of(tmp_path, **changes, trt=TrtOptions(refit=True)))


def test_a_machine_without_triton_is_told_so_beforehand(with_plugins, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "lcexport.dit.sparse_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(IncompatibleError, match="needs Triton"):
        require(options_of(tmp_path))


def test_the_build_refuses_before_it_writes(run, demo_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    code, out, err = run(
        "build", "--model", demo_checkpoint, "--res", "64x96x5", "--backend", "tensorrt-rtx",
        "--precision", "bf16", "--only", "compile", "--trt", "sparse_kernel=plugin", "-o",
        tmp_path / "bundle",
    )  # fmt: skip
    assert (code, out) == (IncompatibleError.exit_code, "")
    assert "has no sparse_kernel=plugin" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sparse_checkpoint(demo_checkpoint, tmp_path):
    """The demo checkpoint as if it had been trained block-sparse."""
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "ck"))
    path = folder / "dit" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "bsa_params": BlockSparseParams().model_dump()}), "utf-8")
    return folder


@pytest.fixture
def compiled(monkeypatch, with_plugins):
    """What each plan was compiled with: its name, `sparse_kernel` and the kernel."""
    kernels = []

    def compile_graph(name, graph, graph_path, output, options, *rest, kernel, **more):
        kernels.append((output.name, options.sparse_kernel, kernel))
        output.write_bytes(b"a plan")
        nothing = dict.fromkeys(NetworkSummary.model_fields, 0) | {"inputs": (), "outputs": ()}
        return PlanReport(
            bytes=6, sha256=hashlib.sha256(b"a plan").hexdigest(), seconds=0.0, version="11.4.0",
            peak_rss_bytes=1, summary=NetworkSummary.model_validate(nothing),
        )  # fmt: skip

    for check in ("require_backend", "require_compiler"):
        monkeypatch.setattr(running, check, lambda *words: None)
    for place in ("refuse_violations", "gpu_of"):
        monkeypatch.setattr(compiling, place, lambda *words: None)
    monkeypatch.setattr(compiling, "trt_options", lambda backend, options: options.trt)
    monkeypatch.setattr(compiling, "compile_graph", compile_graph)
    return kernels


@pytest.mark.parametrize("weights", ["inside", "shared"])
def test_every_plan_gets_the_kernel_and_the_manifest_says_so(
    compiled, sparse_checkpoint, tmp_path, weights
):
    pytest.importorskip("triton")
    options = options_of(tmp_path, weights=weights, segments=2 if weights == "inside" else 0)
    bundle = build(options)
    assert len(compiled) == (2 if weights == "inside" else 3)
    for _, asked, kernel in compiled:
        assert asked == "plugin"
        assert ".target sm_90" in kernel.ptx
        head = kernel.ptx[kernel.ptx.index(".entry") :]
        assert head[: head.index(")")].count(".param") == 8
    engine = bundle.manifest.engines["tensorrt"]["64x96x5.refine"]
    assert engine.options["sparse_kernel"] == "plugin"
    compiled.clear()
    changes = {"trt": TrtOptions(), "output": tmp_path / "other"}
    other = build(options.model_copy(update=changes)).manifest.engines["tensorrt"]
    assert {kernel for _, _, kernel in compiled} == {None}
    assert other["64x96x5.refine"].options["sparse_kernel"] == "graph"
