"""Attention over the kept key chunks as one Triton kernel: a program per head and query chunk.

Each program holds its queries, walks over the list of kept key chunks with an online softmax, and
accumulates in float32. Only the lists are read, never a mask; scores exist a chunk at a time. The
gate that makes the lists is torch's (`lcexport.dit.sparse.gate`): it is a small product and a
top-k. Imported only where tensors are on CUDA; under TRITON_INTERPRET=1 it runs on the CPU.
"""

import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lcexport.configs.errors import BuildError, IncompatibleError
from lcexport.engines.trt.sparse_plugin import Kernel

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ModuleNotFoundError as error:  # torch for CPUs brings none
    raise IncompatibleError(
        "block-sparse attention on CUDA needs Triton",
        got="none is installed",
        do="Install torch for CUDA, which brings it, or: pip install triton",
    ) from error

LEAST = 16  # the smallest side of a product on tensor cores
ALIGNMENT = 16  # bytes; engines align tensors to more
SHARED_BYTES = 48 * 1024  # what a kernel gets without asking for more
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kept_ptr,
    query_chunks,
    key_chunks,
    most,
    out_ptr,
    counts_ptr,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q, out [BA, query_chunks, P, D], k, v [BA, key_chunks, C, D], kept [BA, query_chunks, most].

    kept and counts ([BA, query_chunks]) are int32; without counts, all of `most` count. Everything
    is contiguous. A BLOCK is its size rounded up to a power of 2. The order of inputs, sizes and
    output is that of a TensorRT plugin's, which has no counts.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # times a head's values: more than int32 holds
    row = head * query_chunks + chunk
    p, c, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    at_q = row * P * D + p[:, None] * D + d[None, :]
    in_q = (p[:, None] < P) & (d[None, :] < D)
    at_k = c[:, None] * D + d[None, :]
    in_k = (c[:, None] < C) & (d[None, :] < D)
    q = tl.load(q_ptr + at_q, mask=in_q, other=0.0)
    highest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    out = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    count = most
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    for i in range(count):
        kept = tl.load(kept_ptr + row * most + i)
        base = (head * key_chunks + kept) * C * D
        k = tl.load(k_ptr + base + at_k, mask=in_k, other=0.0)
        # IEEE: float32 inputs are not rounded to TF32; bfloat16 inputs are not concerned.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(c[None, :] < C, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fading = tl.exp(highest - higher)
        total = total * fading + tl.sum(weights, 1)
        v = tl.load(v_ptr + base + at_k, mask=in_k, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * fading[:, None], input_precision="ieee")
        highest = higher
    # A chunk that keeps nothing has a total of 0 and becomes zero.
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + at_q, out.to(out_ptr.dtype.element_ty), mask=in_q)


def attend_kept_triton(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """`lcexport.dit.sparse.attend_kept` as the kernel; chunks contiguous, on one device."""
    batch, chunks, tokens, dim = q.shape
    out = torch.empty_like(q)
    if kept.shape[-1] == 0:  # no list to point at
        return out.zero_()
    sizes: dict[str, Any] = block_sizes(tokens, k.shape[2], dim)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend_kernel[(chunks, batch)](
            q,
            k,
            v,
            kept.to(torch.int32).contiguous(),
            chunks,
            k.shape[1],
            kept.shape[-1],
            out,
            counts.to(torch.int32).contiguous(),
            **sizes,
        )
    return out


def compile_kernel(
    dtype: torch.dtype, queries: int, keys: int, dim: int, capability: int
) -> Kernel:
    """The kernel for a TensorRT plugin, as PTX; needs no GPU.

    Args:
        queries, keys, dim: tokens of a chunk of queries and of keys, and the head dimension.
        capability: 90 for compute capability 9.0.

    Raises:
        BuildError: it needs more shared memory than a kernel gets without asking.
    """
    sizes = block_sizes(queries, keys, dim)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{TYPES[dtype]}")
    numbers = dict.fromkeys(("query_chunks", "key_chunks", "most"), "i32")
    constants = dict.fromkeys(("counts_ptr", *sizes), "constexpr")
    arguments = attend_kernel.arg_names
    source = ASTSource(
        fn=attend_kernel,
        signature=pointers | {"kept_ptr": "*i32"} | numbers | constants,
        constexprs={"counts_ptr": None} | sizes,
        attrs={
            (index,): [["tt.divisibility", ALIGNMENT]]
            for index, name in enumerate(arguments)
            if name in pointers
        },
    )
    for stages in (3, 2, 1):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_stages": stages}
        )
        if compiled.metadata.shared <= SHARED_BYTES:
            ptx = without_scratch(compiled.asm["ptx"], len(pointers) + 1 + len(numbers))
            threads = 32 * compiled.metadata.num_warps
            return Kernel(compiled.metadata.name, ptx, threads, compiled.metadata.shared)
    raise BuildError(
        "the kernel needs too much shared memory",
        got=f"{compiled.metadata.shared} bytes",
        wanted=f"at most {SHARED_BYTES}",
        do="Smaller chunks need less, and so does bfloat16.",
    )


def without_scratch(ptx: str, wanted: int) -> str:
    """PTX whose entry has `wanted` parameters: Triton adds pointers to scratch memory.

    As we read `tensorrt.plugin`, TensorRT passes only the plugin's own (not tried). The kernel uses
    no scratch, so nothing reads the others.
    """
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    if entry is None:
        raise BuildError("Triton's PTX has no entry with parameters")
    parameters = [line.strip() for line in entry[1].split(",")]
    for parameter in parameters[wanted:]:
        if len(re.findall(rf"\b{parameter.split()[-1]}\b", ptx)) > 1:
            raise BuildError("the kernel uses scratch memory", got=parameter)
    kept = ",\n\t".join(parameters[:wanted])
    return f"{ptx[: entry.start(1)]}\n\t{kept}\n{ptx[entry.end(1) :]}"


def block_sizes(queries: int, keys: int, dim: int) -> dict[str, int]:
    """The kernel's constants: sizes of a chunk and of a head, and these as powers of 2."""
    sizes = {"P": queries, "C": keys, "D": dim}
    blocks = {f"BLOCK_{n}": max(LEAST, triton.next_power_of_2(s)) for n, s in sizes.items()}
    return sizes | blocks
