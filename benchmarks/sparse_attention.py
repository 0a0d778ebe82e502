"""Time and memory of block-sparse and dense attention on this processor, each in its own process.

    python benchmarks/sparse_attention.py [--tokens 8192] [--heads 8] [--dim 128]

Forms: torch's dense attention, the operation's loop, ONNX Runtime's dense Attention, and the
graph's functions in ONNX Runtime. Peak memory is the process's, less what it held before the call.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from lcexport.dit.sparse import Grid, Sparsity, block_sparse_attention
from lcexport.graph.sparse import SIZES, sparse_functions

FORMS = ("torch-dense", "torch-sparse", "ort-dense", "ort-sparse")


def sparse_model(
    shape_q: tuple[int, ...], shape_k: tuple[int, ...], grid_q: Grid, grid_k: Grid, how: Sparsity
) -> bytes:
    """One call of the graph's functions: q, k, v -> o."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    shapes = {"q": shape_q, "k": shape_k, "v": shape_k, "o": shape_q}
    q, k, v, out = (ir.Value(name=n, shape=ir.Shape(s), type=kind) for n, s in shapes.items())
    chunks = math.prod(grid_k) // math.prod(how.chunk_k)
    sizes = zip(SIZES, (grid_q, grid_k, how.chunk_q, how.chunk_k), strict=True)
    attributes = [ir.AttrInt64s(*size) for size in sizes]
    attributes.append(ir.AttrInt64("kept", how.kept(chunks)))
    node = ir.Node("lcexport", "BlockSparseAttention", [q, k, v], attributes, outputs=[out])
    opsets = {"": 23, "lcexport": 1}
    graph = ir.Graph([q, k, v], [out], nodes=[node], opset_imports=opsets, name="one")
    functions = sparse_functions(ir.Function("", "one", graph=graph, attributes=[]))
    return ir.to_proto(ir.Model(graph, ir_version=11, functions=functions)).SerializeToString()


def dense_model(shape: tuple[int, ...]) -> bytes:
    sizes = ",".join(map(str, shape))
    inputs = ", ".join(f"float[{sizes}] {name}" for name in "qkv")
    text = f"""<ir_version: 11, opset_import: ["": 23]> one ({inputs}) => (float[{sizes}] o)
    {{ o = Attention <scale = 1.0> (q, k, v) }}"""
    return onnx.parser.parse_model(text).SerializeToString()


def measure(form: str, tokens: int, heads: int, dim: int) -> dict[str, object]:
    """Seconds of the better of two calls, and what they added to the peak memory."""
    grid = (8, 8, tokens // 64)
    shape = (1, heads, tokens, dim)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name in "qkv"}
    arrays["q"] /= math.sqrt(dim)
    q, k, v = (torch.from_numpy(array) for array in arrays.values())
    sparsity = Sparsity()
    if form == "torch-dense":
        call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)  # noqa: E731
    elif form == "torch-sparse":
        call = lambda: block_sparse_attention(q, k, v, grid, grid, sparsity)  # noqa: E731
    else:
        model = (
            sparse_model(shape, shape, grid, grid, sparsity)
            if form == "ort-sparse"
            else dense_model(shape)
        )
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        call = lambda: session.run(None, arrays)  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"form": form, "seconds": round(min(seconds), 2), "megabytes": round(peak / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--form", choices=FORMS)
    given = parser.parse_args()
    if given.form:
        print(json.dumps(measure(given.form, given.tokens, given.heads, given.dim)))
        return
    sizes = [f"--{name}={getattr(given, name)}" for name in ("tokens", "heads", "dim")]
    for form in FORMS:
        subprocess.run([sys.executable, __file__, f"--form={form}", *sizes], check=True)


if __name__ == "__main__":
    main()
