"""What NVIDIA_TF32_OVERRIDE does to a build of the real compiler, beside the flag TF32.

docs/onnxruntime.md and docs/tensorrt.md quote it. The variable is read once by a process, so each
build has its own. A plan of RTX 1.7.1 says in its bytes whether it was built with TF32.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TF32_OVERRIDE, TrtOptions
from lcexport.engines.trt.product import Product
from lcexport.engines.trt.worker import child_environment, compile_graph, compiler_environment

GRAPH = "g (float[64,256] x, float[256,256] w) => (float[64,256] y) { y = MatMul (x, w) }"
BUILD = """
import sys
import tensorrt_rtx as trt
from onnx import parser

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
reader = trt.OnnxParser(network, logger)
model = parser.parse_model('<ir_version: 11, opset_import: ["" : 23]> ' + sys.argv[2])
assert reader.parse(model.SerializeToString())
config = builder.create_builder_config()
if sys.argv[1] == 'clear':
    config.clear_flag(trt.BuilderFlag.TF32)
sys.stdout.buffer.write(bytes(builder.build_serialized_network(network, config)))
"""


def has_tf32(plan: bytes) -> bool:
    """What a plan says of itself."""
    said = {value: f"tf32={value}".encode() in plan for value in (0, 1)}
    assert sum(said.values()) == 1
    return said[1]


@pytest.fixture
def plan_of(rtx: Product):
    """`plan_of("clear", "0")`: the plan of one product, with the flag and the variable."""

    def build(flag: str, variable: str | None) -> bytes:
        environment = {name: value for name, value in os.environ.items() if name != TF32_OVERRIDE}
        if variable is not None:
            environment[TF32_OVERRIDE] = variable
        command = [sys.executable, "-c", BUILD, flag, GRAPH]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    return build


@pytest.mark.parametrize(
    ("flag", "variable", "tf32"),
    [
        ("set", None, True),
        ("clear", None, False),
        ("set", "0", False),
        ("clear", "0", False),
        ("set", "1", True),
        ("clear", "1", True),
    ],
)
def test_the_variable_overrules_the_flag(plan_of, flag, variable, tf32):
    assert has_tf32(plan_of(flag, variable)) == tf32


def test_at_zero_the_flag_changes_nothing(plan_of):
    assert plan_of("set", "0") == plan_of("clear", "0")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("variable", ["0", "1", ""])
def test_a_plan_is_without_tf32_whatever_the_variable(
    graph_from: Callable[[str], bytes], monkeypatch, tmp_path: Path, variable
):
    monkeypatch.setenv(TF32_OVERRIDE, variable)
    output, wanted = tmp_path / "plan", Expectations(attentions=0)
    graph, path = graph_from(GRAPH), tmp_path / "g.onnx"
    compile_graph("tensorrt-rtx", graph, path, output, TrtOptions(), wanted)
    assert not has_tf32(output.read_bytes())


def test_a_wish_for_tf32_is_kept_from_compilers_alone(monkeypatch):
    """Processes that measure eager torch or ONNX Runtime are to see what this one sees."""
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    assert child_environment()[TF32_OVERRIDE] == "1"
    assert TF32_OVERRIDE not in compiler_environment()


def test_nothing_is_compiled_in_a_process_that_asks_for_tf32(compile_text, monkeypatch, tmp_path):
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    with pytest.raises(IncompatibleError, match=rf"got {TF32_OVERRIDE}=1; wanted 0, or no such"):
        compile_text(GRAPH)
    assert not list(tmp_path.iterdir())
