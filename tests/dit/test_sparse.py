"""Block-sparse attention: definition, operation and kernel against the original's golden cases."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import InputError, UsageError
from lcexport.dit import sparse as module
from lcexport.dit.sparse import (
    Sparsity,
    attend_kept,
    block_mask,
    block_sparse_attention,
    dense_reference,
    from_chunks,
    gate,
    to_chunks,
)

GRID = (4, 8, 8)
CASES = ("a", "b", "c")
HALF = Sparsity(0.5)


def case_of(golden, name):
    """(q, k, v, grid_q, grid_k, sparsity), output, mask; the queries scaled as ours are."""
    case = golden("bsa_tiny")
    said = case.meta["cases"][name]
    q, k, v = (case[f"{name}.{x}"] for x in "qkv")
    chunk = tuple(said["c"])
    sparsity = Sparsity(said["sparsity"], None, chunk, chunk)
    given = (q / math.sqrt(q.shape[-1]), k, v, tuple(said["sq"]), tuple(said["sk"]), sparsity)
    return given, case[f"{name}.output"], case[f"{name}.block_mask"]


def random_qkv(dim=16, dtype=torch.float32, grid=GRID):
    q, k, v = torch.randn(3, 2, 3, math.prod(grid), dim).to(dtype)
    return q / 4, k, v


@pytest.mark.parametrize("attention", [dense_reference, block_sparse_attention])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_original(golden, name, attention):
    given, output, mask = case_of(golden, name)
    torch.testing.assert_close(attention(*given), output, atol=2e-5, rtol=0)
    q, k, _, grid_q, grid_k, sparsity = given
    assert torch.equal(block_mask(q, k, grid_q, grid_k, sparsity), mask)


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(0.75),
        Sparsity(None, 0.6),
        Sparsity(0.75, 0.6),
        Sparsity(0.5, None, (4, 4, 4), (2, 2, 4)),
        Sparsity(0.5, None, (1, 8, 2), (4, 4, 4)),
    ],
)
def test_the_operation_is_the_definition(sparsity):
    given = (*random_qkv(), GRID, GRID, sparsity)
    out = block_sparse_attention(*given)
    assert out.abs().max() > 0.1
    torch.testing.assert_close(out, dense_reference(*given), atol=2e-5, rtol=0)


def test_nothing_left_out_is_dense_attention():
    q, k, v = random_qkv()
    out = block_sparse_attention(q, k, v, GRID, GRID, Sparsity(0.0))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0)


def test_nothing_kept_is_zero():
    q, k, v = random_qkv()
    sparsity = Sparsity(0.9)
    assert sparsity.kept(4) == 0
    for attention in (dense_reference, block_sparse_attention):
        assert torch.equal(attention(q, k, v, GRID, GRID, sparsity), torch.zeros_like(q))


def test_the_cdf_threshold_keeps_more_where_the_gate_is_unsure():
    q, k, _ = random_qkv()
    sure = q * 100
    few, many = (block_mask(x, k, GRID, GRID, Sparsity(None, 0.9)).sum() for x in (sure, q))
    assert few < many


def test_both_rules_keep_what_either_keeps():
    q, k, _ = random_qkv()
    both, share, count = (
        block_mask(q, k, GRID, GRID, Sparsity(*rule))
        for rule in ((0.75, 0.6), (None, 0.6), (0.75, None))
    )
    assert torch.equal(both, share | count)


def test_bfloat16_is_near_float32():
    q, k, v = random_qkv(dtype=torch.bfloat16)
    given = (q, k, v, GRID, GRID, HALF)
    out = block_sparse_attention(*given)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dense_reference(*given), atol=2e-2, rtol=2e-2)


def test_groups_of_any_size_are_the_same(monkeypatch):
    q, k, v = (to_chunks(x, GRID, HALF.chunk_q) for x in random_qkv())
    kept, counts = gate(q, k, HALF)
    whole = attend_kept(q, k, v, kept, counts)
    monkeypatch.setattr(module, "GATHERED", 1)
    torch.testing.assert_close(attend_kept(q, k, v, kept, counts), whole, atol=1e-6, rtol=0)


def test_regrouping_comes_back():
    x = torch.randn(2, 3, math.prod(GRID), 5)
    chunks = to_chunks(x, GRID, (2, 4, 8))
    assert chunks.shape == (6, 4, 64, 5)
    assert torch.equal(from_chunks(chunks, x.shape, GRID, (2, 4, 8)), x)
    # The first chunk holds frames 0 and 1 of rows 0 to 3.
    frame = GRID[1] * GRID[2]
    assert torch.equal(chunks[0, 0, 32], x[0, 0, frame])


def test_a_grid_that_cannot_be_cut_is_refused():
    q, k, v = random_qkv(grid=(4, 6, 8))
    with pytest.raises(UsageError, match="4 x 6 x 8") as error:
        block_sparse_attention(q, k, v, (4, 6, 8), (4, 6, 8), HALF)
    assert "multiples of 4 x 4 x 4" in str(error.value)


def test_a_grid_of_other_tokens_is_refused():
    q, k, v = random_qkv()
    with pytest.raises(UsageError, match="keys"):
        block_sparse_attention(q, k, v, GRID, (4, 8, 4), HALF)


def test_the_operation_is_well_behaved():
    """Its schema, its fake implementation, and its trace."""
    q, k, v = random_qkv()
    args = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, [*GRID], [*GRID])
    torch.library.opcheck(module._operation, (*args, [4, 4, 4], [4, 4, 4], 0.5, None))


def test_export_keeps_it_as_one_node():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return block_sparse_attention(q, k, v, GRID, GRID, HALF)

    exported = torch.export.export(Attend(), random_qkv(), strict=False)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.lcexport.block_sparse_attention.default]


def inputs_of(dit, frames=4):
    config = dit.config
    latents = torch.randn(1, config.in_channels, frames, 8, 8)
    return latents, torch.randn(1, 1, 10, config.caption_channels), torch.full((1, frames), 500.0)


SMALL = Sparsity(0.5, None, (2, 2, 2), (2, 2, 2))


def test_a_dit_that_leaves_nothing_out_is_dense(dit):
    given = inputs_of(dit)
    everything = replace(SMALL, sparsity=0.0)
    torch.testing.assert_close(dit(*given, sparse=everything), dit(*given), atol=2e-5, rtol=0)
    assert (dit(*given, sparse=SMALL) - dit(*given)).abs().max() > 1e-3


def test_conditioning_and_noise_are_gated_apart(dit, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lcexport.dit.attention.block_sparse_attention",
        lambda q, k, v, *rest: calls.append(rest) or dense_reference(q, k, v, *rest),
    )
    given = inputs_of(dit)
    by_reference = dit(*given, num_cond_latents=2, sparse=SMALL)
    assert calls[:2] == [((2, 4, 4), (2, 4, 4), SMALL), ((2, 4, 4), (4, 4, 4), SMALL)]
    monkeypatch.undo()
    out = dit(*given, num_cond_latents=2, sparse=SMALL)
    torch.testing.assert_close(out, by_reference, atol=2e-5, rtol=0)


def test_a_single_frame_is_dense(dit):
    given = inputs_of(dit, frames=1)
    assert torch.equal(dit(*given, sparse=SMALL), dit(*given))


def test_the_released_parameters():
    params = {
        "sparsity": 0.9375,
        "chunk_3d_shape_q": [4, 4, 4],
        "chunk_3d_shape_k": [4, 4, 4],
    }
    config = DiTConfig.model_validate({"bsa_params": params | {"cdf_threshold": None}})
    assert config.bsa_params is not None
    assert Sparsity.from_params(config.bsa_params) == Sparsity()
    assert Sparsity().kept(2640) == 165
    assert DiTConfig.model_validate({"bsa_params": None}).bsa_params is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.5},
        {"sparsity": None},
        {"chunk_3d_shape_q": [4, 4]},
        {"chunk_3d_shape_k": [4, 0, 4]},
        {"sparsty": 0.5},
    ],
)
def test_parameters_that_are_none_are_refused(wrong, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(DiTConfig().model_dump_json(exclude={"bsa_params"})[:-1] + ', "bsa_params": ')
    path.write_text(path.read_text() + json.dumps(wrong) + "}")
    with pytest.raises(InputError, match="bsa_params"):
        DiTConfig.from_json(path)
    assert BlockSparseParams().sparsity == 0.9375


INTERPRETED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from lcexport.dit.sparse_triton import attend_kept_triton
given = load_file(sys.argv[1])
names = sorted({name.partition(".")[0] for name in given})
made = {n: attend_kept_triton(*(given[f"{n}.{x}"] for x in "qkvic")) for n in names}
save_file(made, sys.argv[2])
"""


def test_the_kernel_in_tritons_interpreter(golden, tmp_path: Path):
    """All golden cases, and sizes that are no powers of 2, in one process of its own."""
    pytest.importorskip("triton")
    from safetensors.torch import load_file, save_file

    cases = {name: case_of(golden, name)[0] for name in CASES}
    odd = Sparsity(0.5, None, (2, 2, 3), (4, 2, 1))
    cases["odd"] = (*random_qkv(dim=24, grid=(4, 2, 3)), (4, 2, 3), (4, 2, 3), odd)
    cases["cdf"] = (*random_qkv(), GRID, GRID, Sparsity(None, 0.3))
    cases["none"] = (*random_qkv(), GRID, GRID, Sparsity(0.9))
    tensors = {}
    for name, (q, k, v, grid_q, grid_k, sparsity) in cases.items():
        chunks = to_chunks(q, grid_q, sparsity.chunk_q)
        keys, values = (to_chunks(x, grid_k, sparsity.chunk_k) for x in (k, v))
        lists = gate(chunks, keys, sparsity)
        parts = zip("qkvic", (chunks, keys, values, *lists), strict=True)
        tensors |= {f"{name}.{x}": tensor.contiguous() for x, tensor in parts}
    save_file(tensors, tmp_path / "given")
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "given"), str(tmp_path / "made")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "made")
    for name, (q, k, v, grid_q, grid_k, sparsity) in cases.items():
        out = from_chunks(made[name], q.shape, grid_q, sparsity.chunk_q)
        wanted = dense_reference(q, k, v, grid_q, grid_k, sparsity)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)
        if name in CASES:
            torch.testing.assert_close(out, case_of(golden, name)[1], atol=2e-5, rtol=0)


def test_the_kernel_compiles_for_hopper_without_a_gpu():
    pytest.importorskip("triton")
    from lcexport.dit.sparse_triton import compile_kernel

    kernel = compile_kernel(torch.bfloat16, 64, 64, 128, 90)
    head = kernel.ptx[kernel.ptx.index(".entry") :]
    assert kernel.name in head[:100]
    assert head[: head.index(")")].count(".param") == 8
    assert "wgmma" in kernel.ptx  # on tensor cores
    assert kernel.shared_bytes <= 48 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_is_the_definition(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    q, k, v = (x.cuda() for x in random_qkv(dim=128, dtype=dtype))
    given = (q, k, v, GRID, GRID, HALF)
    wanted = dense_reference(*given)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    out = block_sparse_attention(*given)
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)


def test_cuda_without_triton_is_an_error():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lcexport.configs.errors import IncompatibleError\n"
        "try:\n    import lcexport.dit.sparse_triton\n"
        "except IncompatibleError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Triton" in done.stdout
