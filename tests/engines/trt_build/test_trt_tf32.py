"""What NVIDIA_TF32_OVERRIDE does to a build of the real compiler, beside the flag TF32.

docs/onnxruntime.md quotes it. The variable is read once by a process, so each build has its own.
"""

import os
import subprocess
import sys

import pytest

from lcexport.engines.trt.product import Product

VARIABLE = "NVIDIA_TF32_OVERRIDE"
BUILD = """
import hashlib, sys
import tensorrt_rtx as trt
from onnx import parser

TEXT = '<ir_version: 11, opset_import: ["" : 23]> g (float[64,256] x, float[256,256] w) => '
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
reader = trt.OnnxParser(network, logger)
model = parser.parse_model(TEXT + '(float[64,256] y) { y = MatMul (x, w) }')
assert reader.parse(model.SerializeToString())
config = builder.create_builder_config()
if sys.argv[1] == 'clear':
    config.clear_flag(trt.BuilderFlag.TF32)
plan = builder.build_serialized_network(network, config)
print(hashlib.sha256(bytes(plan)).hexdigest())
"""


@pytest.fixture
def plan_of(rtx: Product):
    """`plan_of("clear", "0")`: SHA-256 of the plan of one product, with the flag and variable."""

    def build(flag: str, variable: str | None) -> str:
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        if variable is not None:
            environment[VARIABLE] = variable
        command = [sys.executable, "-c", BUILD, flag]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()[-1]

    return build


def test_the_variable_clears_what_the_flag_sets(plan_of):
    cleared = plan_of("clear", None)
    assert plan_of("set", None) != cleared
    assert plan_of("set", "0") == plan_of("clear", "0")
