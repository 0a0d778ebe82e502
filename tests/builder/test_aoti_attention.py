"""Attention that packages compute themselves, held against float64."""

import ctypes
import math
import re
import zipfile
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.cpu_vec_isa import (
    VecAVX2,
    VecAVX512,
    VecISA,
    invalid_vec_isa,
    valid_vec_isa_list,
)

from lcexport.builder import aoti_attention
from lcexport.builder.aoti_attention import ATTENTION, CODE, OWN_ATTENTION, use_attention
from lcexport.builder.aoti_worker import SETTINGS

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # of values of about 1
INTERFACE = """
using Known = lcexport::Heads<const float>;

extern "C" void run(
    const float* q, const float* k, const float* v, float* out,
    int64_t batch, int64_t heads, int64_t asked, int64_t known, float scale) {{
  const int64_t token = heads * {dim};
  lcexport::attention<{dim}>(
      Known{{q, asked * token, {dim}, token}}, Known{{k, known * token, {dim}, token}},
      Known{{v, known * token, {dim}, token}}, {{out, asked * token, {dim}, token}},
      batch, heads, asked, known, scale);
}}
"""


class Compiled:
    """attention.h by the compiler's options that a package gets, for heads of one size."""

    def __init__(self, isa: VecISA, dim: int, folder: Path) -> None:
        source = folder / "attention.cpp"
        source.write_text(CODE.read_text() + INTERFACE.format(dim=dim))
        options = CppTorchOptions(vec_isa=isa, shared=True)
        builder = CppBuilder("attention", [str(source)], options, output_dir=str(folder))
        builder.build()
        self.dim = dim
        self._run = ctypes.CDLL(builder.get_target_file_path()).run
        self._run.argtypes = (c_void_p,) * 4 + (c_int64,) * 4 + (c_float,)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Each [B, tokens, A, D], side by side in memory."""
        out = torch.full_like(q, torch.nan)
        places = (x.data_ptr() for x in (q, k, v, out))
        self._run(*places, q.shape[0], q.shape[2], q.shape[1], k.shape[1], scale)
        return out


WIDTHS = {
    isa.bit_width(): isa for isa in valid_vec_isa_list() if isinstance(isa, VecAVX2 | VecAVX512)
}
needs_vectors = pytest.mark.skipif(not WIDTHS, reason="neither AVX2 nor AVX-512 here")


@pytest.fixture(scope="module", params=WIDTHS.values(), ids=str)
def isa(request) -> VecISA:
    """Every kind of vectors that this processor has."""
    return request.param


@pytest.fixture(scope="module")
def compiled(isa, tmp_path_factory) -> Compiled:
    return Compiled(isa, 128, tmp_path_factory.mktemp("wide"))


def tensors(asked: int, known: int, batch: int = 1, heads: int = 2, dim: int = 128):
    generator = torch.Generator().manual_seed(5)
    sizes = (asked, known, known)
    return [torch.randn(batch, n, heads, dim, generator=generator) for n in sizes]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """By its definition, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (1, 1), (5, 3), (12, 32), (13, 33), (24, 256), (25, 257), (7, 1000), (3072, 40),
        (3085, 17),
    ],
)  # fmt: skip
def test_it_is_softmax_of_products_whatever_is_left_over_of_tiles_and_panels(
    compiled, asked, known
):
    q, k, v = tensors(asked, known)
    out = compiled(q, k, v, 0.1)
    torch.testing.assert_close(out.double(), exact(q, k, v, 0.1), **TOLERANCE)


def test_samples_and_heads_are_their_own(compiled):
    q, k, v = tensors(50, 70, batch=3, heads=5)
    out = compiled(q, k, v, 0.1)
    torch.testing.assert_close(out.double(), exact(q, k, v, 0.1), **TOLERANCE)


def test_heads_of_64(isa, tmp_path):
    q, k, v = tensors(30, 300, dim=64)
    out = Compiled(isa, 64, tmp_path)(q, k, v, 0.125)
    torch.testing.assert_close(out.double(), exact(q, k, v, 0.125), **TOLERANCE)


def test_scores_that_no_exponential_holds(compiled):
    """Of several hundred, and later ones higher than earlier ones: the softmax is shifted."""
    q, k, v = tensors(40, 600)
    k *= torch.linspace(1, 30, 600)[:, None, None]
    out = compiled(q, k, v, 1.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    assert scores.max() > 500
    # float32's scores have errors of their own, by which shares change
    torch.testing.assert_close(out.double(), exact(q, k, v, 1.0), rtol=0, atol=2e-3)


def test_a_key_that_matters_less_than_float32_can_tell(compiled):
    q, k, v = (torch.ones(1, n, 1, 128) for n in (1, 2, 2))
    k[:, 1] = -1
    v[:, 1] = 1e30
    out = compiled(q, k, v, 1.0)  # scores of 128 and -128
    torch.testing.assert_close(out, torch.ones_like(out))


def test_what_is_no_number_stays_none_and_spoils_nothing_else(compiled):
    q, k, v = tensors(20, 300)
    q[0, 3, 1, 7] = torch.nan
    out = compiled(q, k, v, 0.1)
    spoiled = out.isnan().any(-1)
    assert spoiled.nonzero().tolist() == [[0, 3, 1]]
    assert out[0, 3, 1].isnan().all()


def test_threads_do_not_change_a_bit(compiled):
    q, k, v = tensors(1000, 300, heads=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled(q, k, v, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Attends(nn.Module):
    """Tokens [N, A*D], the first three of which see each other alone, as clean latents' do; and
    attention of heads [A, D, N], whose values are not side by side.
    """

    def forward(self, q: Tensor, kv: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.reshape(1, -1, 2, 32).transpose(1, 2) for x in kv.chunk(2, dim=1))
        q = q.sin().reshape(1, -1, 2, 32).transpose(1, 2)
        first = F.scaled_dot_product_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], scale=0.2)
        rest = F.scaled_dot_product_attention(q[:, :, 3:], k, v, scale=0.2)
        out = torch.cat([first, rest], dim=2)
        x = across.mT[None]
        other = F.scaled_dot_product_attention(x, x + 1, x - 1, scale=0.2)
        return out.transpose(1, 2).reshape(-1, 64) + 1, other


@needs_vectors
def test_a_package_holds_it_and_reads_views_where_they_lie(tmp_path):
    given = torch.randn(45, 64), torch.randn(45, 128), torch.randn(2, 32, 21)
    program = torch.export.export(Attends(), given, strict=False)
    use_attention(program)
    torch.testing.assert_close(program.module()(*given), Attends()(*given))
    path = tmp_path / "package.pt2"
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=dict(SETTINGS)
    )
    found = torch._inductor.aoti_load_package(str(path))(*given)
    for out, wanted in zip(found, Attends()(*(x.double() for x in given)), strict=True):
        torch.testing.assert_close(out.double(), wanted, **TOLERANCE)
    with zipfile.ZipFile(path) as package:
        names = package.namelist()
        (library,) = (package.read(n) for n in names if n.endswith(".so"))
        (code,) = (package.read(n) for n in names if n.endswith(".wrapper.cpp"))
    assert b"lcexport5ChunkILi32E" in library  # the name of Chunk<32>, as compilers write it
    assert b"scaled_dot_product" not in library
    # Who reads keys and values as they were handed in: two attentions, which take queries beside
    # them and give one tensor, and nothing that would copy them.
    readers = re.findall(rb"\w+\(([^;]*\(arg1_1\.data_ptr\(\)\)[^;]*)\);", code)
    taken_given = [(a.count(b"(const float*)"), a.count(b"(float*)")) for a in readers]
    assert taken_given == [(2, 1), (2, 1)]


@pytest.mark.parametrize(
    ("dim", "dtype", "more"),
    [
        (24, torch.float32, {"scale": 1.0}),
        (64, torch.bfloat16, {"scale": 1.0}),
        (64, torch.float32, {}),
        (64, torch.float32, {"scale": math.inf}),
        (64, torch.float32, {"scale": 1.0, "is_causal": True}),
        (64, torch.float32, {"scale": 1.0, "attn_mask": torch.ones(5, 5, dtype=torch.bool)}),
    ],
    ids=["head dimension", "type", "no scale", "infinite", "causal", "mask"],
)
def test_other_attention_stays_torchs(dim, dtype, more):
    class Other(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, **more)

    given = (torch.randn(1, 2, 5, dim, dtype=dtype),)
    program = torch.export.export(Other(), given, strict=False)
    use_attention(program)
    targets = [node.target for node in program.graph.nodes]
    assert ATTENTION in targets
    assert OWN_ATTENTION not in targets


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((1, 2, 5, 64), (1, 2, 5, 32)), ((1, 2, 0, 64), (1, 2, 0, 64)), ((1, 1, 5, 64),) * 2],
    ids=["values of another head dimension", "no keys", "one head for all"],
)
def test_other_keys_and_values_stay_torchs(keys, values):
    given = torch.randn(1, 2, 5, 64), torch.randn(keys), torch.randn(values)
    program = torch.export.export(Attention(), given, strict=False)
    use_attention(program)
    targets = [node.target for node in program.graph.nodes]
    assert ATTENTION in targets
    assert OWN_ATTENTION not in targets


def test_a_processor_with_other_vectors_keeps_torchs(monkeypatch):
    monkeypatch.setattr(aoti_attention, "pick_vec_isa", lambda: invalid_vec_isa)
    program = torch.export.export(Attention(), (torch.randn(1, 2, 5, 64),) * 3, strict=False)
    use_attention(program)
    assert ATTENTION in [node.target for node in program.graph.nodes]
