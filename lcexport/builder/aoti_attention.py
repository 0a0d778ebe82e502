"""Attention that a package for a processor computes itself, in place of torch's.

torch's reaches four fifths of the speed of a product of matrices on a processor with AVX-512, and
attention.h the product's own (docs/performance.md). Attention under a mask, of other types than
float32, or of a head dimension that no whole number of panels holds remains torch's, and so does
all of it on processors that have neither AVX2 nor AVX-512.
"""

import math
from importlib.resources import files
from typing import Any, cast

import torch
import torch._inductor.lowering  # before the template, which imports it in a circle
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, pick_vec_isa
from torch._inductor.ir import Buffer, ExternKernel, FixedLayout, TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.utils import parallel_num_threads
from torch.export import ExportedProgram
from torch.fx import Node

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
PANEL = 32  # columns, with the widest vectors
CODE = files("lcexport.builder").joinpath("attention.h")
CALL = """
extern "C" {declaration} {{
    {profile}
    lcexport::attention<{dim}>({tensors}, {sizes}, {scale}f);
}}
"""


@torch.library.custom_op("lcexport::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v: each [B, A, tokens, D]; a token's heads lie side by side in memory.

    This one, torch's, is what traced programs run; a package has attention.h instead.
    """
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


OWN_ATTENTION = torch.ops.lcexport.attention.default
ATTENTIONS = (ATTENTION, OWN_ATTENTION)


def use_attention(program: ExportedProgram) -> None:
    """Put `lcexport::attention` where the program has an attention that attention.h computes."""
    if not isinstance(pick_vec_isa(), VecAVX2 | VecAVX512):
        return
    register_lowering(OWN_ATTENTION, type_promotion_kind=None)(lowered)
    for node in program.graph.nodes:
        if node.target is ATTENTION and suits(node):
            node.target = OWN_ATTENTION
            node.args, node.kwargs = (*node.args, node.kwargs["scale"]), {}
    program.graph_module.recompile()


def suits(node: Node) -> bool:
    """Whether attention.h computes it: float32 of one shape but for the tokens, and a scale."""
    scale = node.kwargs.get("scale")
    if len(node.args) != 3 or len(node.kwargs) != 1 or not isinstance(scale, float):
        return False
    given = [cast(Node, x).meta["val"] for x in node.args]
    shapes = {(*x.shape[:-2], x.shape[-1]) for x in given}
    batch_heads_dim = shapes.pop()
    return (
        not shapes
        and len(batch_heads_dim) == 3
        and batch_heads_dim[-1] % PANEL == 0
        and given[1].shape[-2] > 0
        and math.isfinite(scale)
        and all(x.dtype is torch.float32 for x in given)
    )


def lowered(q: TensorBox, k: TensorBox, v: TensorBox, scale: float) -> TensorBox:
    """Inductor's node for it."""
    given = [realized(x) for x in (q, k, v)]
    size = q.get_size()
    heads, tokens, dim = size[1:]
    stride: Any = (tokens * heads * dim, dim, heads * dim, 1)
    layout = FixedLayout(q.get_device_or_error(), torch.float32, size, stride)
    out: Any = AttentionTemplate(given, layout, scale).generate().output_node()
    out.data.data.allow_epilogue_fusion = False  # it writes what it gives, nothing else
    return out


def realized(x: TensorBox) -> Any:
    """A tensor in memory, a head's values side by side."""
    there = ExternKernel.realize_input(x)
    there.freeze_layout()
    if there.get_stride()[-1] == 1:
        return there
    copy = ExternKernel.copy_input(there)
    copy.freeze_layout()  # or Inductor would lay it out as the values are read
    return copy


class AttentionTemplate(CppTemplate):
    """attention.h, and a function that calls it for one attention's shapes."""

    def __init__(self, given: list[Any], layout: FixedLayout, scale: float) -> None:
        super().__init__("attention", given, layout, parallel_num_threads())
        self.scale = scale

    def render(self, **given: Any) -> str:
        kernel: CppTemplateKernel = given["kernel"]
        q, k, v = self.input_nodes
        out = given.get("template_buffer_node") or self.output_node  # the former once it is placed
        declaration = kernel.def_kernel(inputs={"q": q, "k": k, "v": v}, outputs={"out": out})
        sizes = (kernel.size(x, i) for x, i in ((q, 0), (q, 1), (q, 2), (k, 2)))
        call = CALL.format(
            declaration=declaration,
            profile=kernel.maybe_codegen_profile(),
            dim=kernel.size(q, 3),
            tensors=", ".join(view(kernel, x) for x in (q, k, v, out)),
            sizes=", ".join(sizes),
            scale=float(self.scale),
        )
        return self.header().getvalue() + CODE.read_text() + call


def view(kernel: CppTemplateKernel, x: Buffer) -> str:
    """Where [B, A, tokens, D] begins, and the strides of B, A and tokens."""
    begin = kernel.index(x, [0, 0, 0, 0])
    return f"{{&{begin}, {', '.join(kernel.stride(x, i) for i in range(3))}}}"
