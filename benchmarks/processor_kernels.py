"""What else could compute the DiT's products and attention on a processor, and how fast.

    python benchmarks/processor_kernels.py [--rounds 9]

Float32, the sizes of the `bench` preset (3,072 tokens, hidden size 1,024, 8 heads). Each way runs
once in turn, round after round, on one thread; its speed is of the processor time it took, so that
what others do on the machine counts little. Medians, in GFLOP/s:

    torch           torch's own product, which eager torch and AOTInductor call
    oneDNN          its product over the weights as they are stored
    oneDNN packed   over weights that it has rearranged once
    fused           torch's attention, over each head's own memory
    as projected    over heads as the projections leave them, a token's side by side
    N rows          attention as two torch products and a softmax for every N queries of a head
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HEADS, WIDTH = 3072, 8, 128
PRODUCTS = ((1024, 1024), (1024, 2816), (2816, 1024))  # projections, and SwiGLU's two ways
CHUNKS = (128, 256, 512)
Way = tuple[Callable[[], Tensor], int]  # and its operations


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in PRODUCTS:
            show("{} x {} to {}".format(TOKENS, *shape), products(*shape), asked.rounds)
        show(f"attention, {HEADS} heads of {WIDTH}", attentions(), asked.rounds)
    return 0


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
    return ways


def in_chunks(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Attention [1, H, N, D] in memory of `rows` x N scores, each row's kept whole."""
    out = torch.empty_like(q)
    for head in range(HEADS):
        keys = k[0, head].t()
        for first in range(0, TOKENS, rows):
            chunk = slice(first, first + rows)
            scores = (q[0, head, chunk] @ keys).softmax(-1)
            torch.mm(scores, v[0, head], out=out[0, head, chunk])
    return out


def show(what: str, ways: Mapping[str, Way], rounds: int) -> None:
    """Check that all ways agree, then take turns."""
    wanted, *others = (run() for run, _ in ways.values())
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
