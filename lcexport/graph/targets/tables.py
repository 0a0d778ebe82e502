"""Products, opsets, operators and element types.

`OPERATORS` was found by trying graphs of one node, parsed and built with TensorRT for RTX 1.7: an
operator and a type stand here where one such graph was built, with one choice of shapes and
attributes. Others, and operators together, were not tried; nor were the operators that are not
here, which no graph of this project needs. TensorRT 10 and 11 were not tried at all: they are taken
to share the parser, but for what `TARGETS` says.
"""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Target = Literal["tensorrt-10", "tensorrt-11", "tensorrt-rtx"]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
NUMBERS = FLOATS | {ir.DataType.INT32}
BOOLS = frozenset({ir.DataType.BOOL})
DATA = NUMBERS | BOOLS
STORED = frozenset({ir.DataType.INT8})  # of weights alone: nothing computes with it
WIDE_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})

MAX_RANK = 8
MAX_VOLUME = 2**31  # elements of one tensor: less than this


@dataclass(frozen=True)
class Limits:
    """Where the products differ."""

    opsets: range
    missing: frozenset[str] = frozenset()


TARGETS: dict[Target, Limits] = {
    # 9 to 25 are those of NVIDIA's opset guide for TensorRT 11 (onnx-tensorrt's notes add 25 with
    # 11.5), and parsed by RTX 1.7. Of 10, 23 is what we export: no source says where it ends.
    # By onnx-tensorrt's changelog Attention came with 10.14, the oldest that is taken, and
    # RMSNormalization and RotaryEmbedding with 10.15. Swish is of opset 24.
    "tensorrt-10": Limits(
        range(9, 24), frozenset({"RMSNormalization", "RotaryEmbedding", "Swish"})
    ),
    "tensorrt-11": Limits(range(9, 26)),
    "tensorrt-rtx": Limits(range(9, 26)),
}


def operators(names: str, types: frozenset[ir.DataType]) -> dict[str, frozenset[ir.DataType]]:
    return dict.fromkeys(names.split(), types)


# Operator -> types of its data input, which is the first but for those in DATA_INPUT.
OPERATORS: dict[str, frozenset[ir.DataType]] = {
    **operators("Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan Tanh", FLOATS),
    **operators("Ceil Elu Erf Exp Floor Gelu HardSigmoid IsInf IsNaN LeakyRelu Log", FLOATS),
    **operators("Reciprocal Relu Round Selu Sigmoid Softplus Softsign Sqrt Swish", FLOATS),
    **operators("ThresholdedRelu PRelu Mean Sum Softmax LogSoftmax", FLOATS),
    **operators("HardSwish Mish", WIDE_FLOATS),
    **operators("Abs Clip Neg Sign", NUMBERS),
    **operators("Add Sub Mul Div Pow Max Min Mod", NUMBERS),
    **operators("Greater GreaterOrEqual Less LessOrEqual", NUMBERS),
    **operators("Equal", DATA),
    **operators("And Or Xor Not", BOOLS),
    **operators("Cast Identity Concat Reshape Flatten Transpose Unsqueeze Squeeze Split", DATA),
    **operators("Slice Expand Tile Gather Where Pad", DATA),
    **operators("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1", NUMBERS),
    **operators("ReduceSumSquare", NUMBERS),
    **operators("ReduceL2 ReduceLogSumExp", FLOATS),
    **operators("ArgMax ArgMin CumSum", NUMBERS),
    **operators("MatMul Gemm Conv Resize", FLOATS),
    **operators("Einsum", WIDE_FLOATS),
    **operators("LayerNormalization RMSNormalization", FLOATS),
    **operators("RotaryEmbedding", FLOATS),
    **operators("DequantizeLinear", STORED),
    # Parsed in float32 as well; the rules of attention say why it may not be.
    **operators("Attention", FLOATS),
}
DATA_INPUT = {"Where": 1}

# ONNX lets these mix floating types, and the parser then converts where the graph does not say so.
SAME_TYPES = frozenset({"Pow", "PRelu", "LayerNormalization", "RMSNormalization"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
