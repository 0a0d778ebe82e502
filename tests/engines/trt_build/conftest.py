"""Real TensorRT for RTX, and small graphs for it written as ONNX text."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx import parser

from lcexport.engines.trt.compile import PlanReport, compile_plan
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import Product, open_product
from lcexport.graph import prove_precision

HEADER = '<ir_version: 11, opset_import: ["" : 23]>\n'


@pytest.fixture(scope="session")
def rtx() -> Product:
    """The real product; the tests that need it are skipped where it is not installed."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx: the real compiler")
    return open_product("tensorrt-rtx")


@pytest.fixture(scope="session")
def dit_graph(make_graph: Callable[..., Path]) -> Path:
    """The golden DiT in bfloat16, its weights beside it."""
    return make_graph("bf16", batch=1, frames=3)


@pytest.fixture(scope="session")
def expected(dit_graph: Path) -> Expectations:
    """What the exporter's own proof counted in it."""
    return Expectations.from_proof(prove_precision(ir.load(dit_graph), torch.bfloat16))


@pytest.fixture
def compile_dit(rtx: Product, dit_graph: Path, expected: Expectations, tmp_path: Path):
    """`compile_dit(weight_streaming=True)` compiles the golden DiT in this process."""

    def run(output: Path = tmp_path / "dit.plan", **arguments) -> PlanReport:
        ours = ("on_progress", "cancel", "check_memory", "refittable")
        rest = {name: arguments.pop(name) for name in ours if name in arguments}
        graph, options = dit_graph.read_bytes(), TrtOptions(**arguments)
        return compile_plan(rtx, graph, dit_graph, options, output, expected, **rest)

    return run


@pytest.fixture(scope="session")
def graph_from() -> Callable[[str], bytes]:
    """`graph_from("g (float[2] x) => (float[2] y) {...}")` is an ONNX file's bytes."""
    return lambda text: parser.parse_model(HEADER + text).SerializeToString()


@pytest.fixture
def compile_text(rtx: Product, graph_from: Callable[[str], bytes], tmp_path: Path):
    """`compile_text("g (float[2] x) => (float[2] y) {...}")` compiles a graph in this process."""

    def run(text: str, expectations: Expectations | None = None, **options) -> PlanReport:
        return compile_plan(
            rtx,
            graph_from(text),
            tmp_path / "text.onnx",
            TrtOptions(**options),
            tmp_path / "text.plan",
            expectations or Expectations(attentions=0),
        )

    return run
