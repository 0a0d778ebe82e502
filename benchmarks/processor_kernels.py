"""What else could compute the DiT's products and attention on a processor, and how fast.

    python benchmarks/processor_kernels.py [--rounds 9]

Float32, the sizes of the `bench` preset (3,072 tokens, hidden size 1,024, 8 heads). Each way runs
once in turn, round after round, on one thread; its speed is of the processor time it took, so that
what others do on the machine counts little. Medians, in GFLOP/s, first with memory as malloc gives
and takes it, then with freed memory kept, as `lcexport generate` and `bench` keep it:

    torch           torch's own product, which eager torch calls
    oneDNN          its product over the weights as they are stored: AOTInductor's packages call it
    oneDNN packed   over weights that it has rearranged once
    ONNX Runtime    its `Gemm` over weights that it has packed; its `MultiHeadAttention`
    fused           torch's attention, over each head's own memory
    as projected    over heads as the projections leave them, a token's side by side
    N rows          attention as two torch products and a softmax for every N queries of a head
    N by oneDNN     the same with oneDNN's products
    no softmax      the products of that alone: the difference is what the exponentials take
    package         what AOTInductor's packages compute (lcexport/builder/attention.h), over heads
                    as the projections leave them
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx.parser
import onnxruntime as ort
import torch
import torch.nn.functional as F
from aotinductor_parts import Package
from onnx.numpy_helper import from_array
from torch import Tensor, nn

from lcexport.engines.host import keep_freed_memory

TOKENS, HEADS, WIDTH = 3072, 8, 128
PRODUCTS = ((1024, 1024), (1024, 2816), (2816, 1024))  # projections, and SwiGLU's two ways
CHUNKS = (128, 256, 512)
HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
GEMM = "g (float[m, k] x) => (float[m, n] y) {y = Gemm<transB=1>(x, w, b)}"
ATTENTION = (
    "g (float[b, n, c] q, float[b, n, c] k, float[b, n, c] v) => (float[b, n, c] y) "
    f"{{y = com.microsoft.MultiHeadAttention<num_heads={HEADS}, scale=1.0>(q, k, v)}}"
)
Matrices = Callable[[Tensor, Tensor], Tensor]
Way = tuple[Callable[[], Tensor], int]  # and its operations


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        show_all(asked.rounds)
        print("freed memory kept:" if keep_freed_memory() else "no glibc:")
        show_all(asked.rounds)
    return 0


def show_all(rounds: int) -> None:
    for shape in PRODUCTS:
        show("{} x {} to {}".format(TOKENS, *shape), products(*shape), rounds)
    show(f"attention, {HEADS} heads of {WIDTH}", attentions(), rounds)


def products(width: int, out: int) -> dict[str, Way]:
    x, weight, bias = torch.randn(TOKENS, width), torch.randn(out, width), torch.randn(out)
    mkldnn = torch.ops.mkldnn
    packed = mkldnn._reorder_linear_weight(weight, TOKENS)
    operations = 2 * TOKENS * width * out
    return {
        "torch": (partial(F.linear, x, weight, bias), operations),
        "oneDNN": (partial(mkldnn._linear_pointwise, x, weight, bias, "none", [], ""), operations),
        "oneDNN packed": (
            partial(mkldnn._linear_pointwise, x, packed, bias, "none", [], ""),
            operations,
        ),
        "ONNX Runtime": (by_onnxruntime(GEMM, x=x, w=weight, b=bias), operations),
    }


def attentions() -> dict[str, Way]:
    q, k, v = (torch.randn(1, HEADS, TOKENS, WIDTH) for _ in range(3))
    operations = 4 * TOKENS * TOKENS * HEADS * WIDTH
    fused = partial(F.scaled_dot_product_attention, q, k, v, scale=1.0)
    ways: dict[str, Way] = {"fused": (fused, operations)}
    between = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    as_projected = partial(F.scaled_dot_product_attention, *between, scale=1.0)
    ways["as projected"] = (as_projected, operations)
    for rows in CHUNKS:
        ways[f"{rows} rows"] = (partial(in_chunks, q, k, v, rows), operations)
    ways["256 by oneDNN"] = (partial(in_chunks, q, k, v, 256, by_onednn), operations)
    alone = partial(in_chunks, q, k, v, 256, by_onednn, softmax=False)
    ways["no softmax"] = (alone, operations)
    side_by_side = tuple(x.transpose(1, 2).reshape(1, TOKENS, HEADS * WIDTH) for x in (q, k, v))
    theirs = by_onnxruntime(ATTENTION, **dict(zip("qkv", side_by_side, strict=True)))
    ways["ONNX Runtime"] = (theirs, operations)
    ways["package"] = (by_package(*side_by_side), operations)
    return ways


def by_package(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """A package of one attention over [1, N, H*D]."""

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(1, TOKENS, HEADS, WIDTH).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    program = torch.export.export(Attention(), (q, k, v), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        package = Package(Path(folder) / "package.pt2", program)
    return lambda: package((q, k, v))[0]


def by_onnxruntime(graph: str, **given: Tensor) -> Callable[[], Tensor]:
    """One operation. Of a product the weights are constants, which it packs once."""
    model = onnx.parser.parse_model(HEAD + graph)
    constants = [n for n in given if n in "wb"]
    model.graph.initializer.extend(from_array(given[n].numpy(), n) for n in constants)
    session = ort.InferenceSession(model.SerializeToString(), threads())
    feeds = {name: x.numpy() for name, x in given.items() if name not in constants}

    def run() -> Tensor:
        (y,) = session.run(None, feeds)
        y = torch.from_numpy(y)
        return y if y.ndim == 2 else y.view(1, TOKENS, HEADS, WIDTH).transpose(1, 2)

    return run


def threads() -> ort.SessionOptions:
    """One."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def by_torch(x: Tensor, y: Tensor) -> Tensor:
    """x [M, K] times the transpose of y [N, K]."""
    return x @ y.t()


def by_onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: int,
    product: Matrices = by_torch,
    *,
    softmax: bool = True,
) -> Tensor:
    """Attention [1, H, N, D] in memory of `rows` x N scores, each row's kept whole."""
    out = torch.empty_like(q)
    for head in range(HEADS):
        keys, values = k[0, head], v[0, head].t().contiguous()
        for first in range(0, TOKENS, rows):
            chunk = slice(first, first + rows)
            scores = product(q[0, head, chunk], keys)
            out[0, head, chunk] = product(scores.softmax(-1) if softmax else scores, values)
    return out


def show(what: str, ways: Mapping[str, Way], rounds: int) -> None:
    """Check that all ways agree, then take turns."""
    wanted, *others = (run() for name, (run, _) in ways.items() if name != "no softmax")
    for other in others:
        torch.testing.assert_close(other, wanted, rtol=1e-3, atol=1e-3)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (run, operations) in ways.items():
            before = time.process_time()
            run()
            speeds[name].append(operations / (time.process_time() - before) / 1e9)
    medians = (f"{name} {statistics.median(found):.1f}" for name, found in speeds.items())
    print(f"{what:28} {', '.join(medians)}")


if __name__ == "__main__":
    raise SystemExit(main())
