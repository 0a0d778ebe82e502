"""What is compiled: the traced program, its float32 products and attention by faster kernels."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import VecAVX2

from lcexport.builder import aoti_attention
from lcexport.builder.aoti_attention import ATTENTION, OWN_ATTENTION
from lcexport.builder.aoti_worker import ONEDNN_PRODUCT, PRODUCT, use_kernels, use_onednn
from lcexport.configs.dit import DiTConfig
from lcexport.dit import Geometry, LongCatDiT
from lcexport.graph import GraphSpec
from lcexport.graph.modules import BlockPart
from lcexport.graph.programs import export_program


def test_a_block_of_the_dit_has_the_faster_kernels(monkeypatch):
    """Both attentions and every product."""
    monkeypatch.setattr(aoti_attention, "pick_vec_isa", VecAVX2)
    config = DiTConfig(hidden_size=64, num_heads=2, depth=1, text_tokens_zero_pad=True)
    geometry = Geometry(1, 2, 4, 4)
    block = BlockPart(LongCatDiT(config), geometry)
    names = [name.removeprefix("block.") for name, _ in block.named_parameters()]
    spec = GraphSpec(geometry, 6, torch.float32)
    program = export_program(config, spec, "Block", names)
    before = Counter(node.target for node in program.graph.nodes)
    use_kernels(program)
    after = Counter(node.target for node in program.graph.nodes)
    assert (before[ATTENTION], before[OWN_ATTENTION]) == (2, 0)
    assert (after[ATTENTION], after[OWN_ATTENTION]) == (0, 2)
    assert after[PRODUCT] == 0
    assert after[ONEDNN_PRODUCT] == before[PRODUCT] > 0


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
        self.third = nn.Linear(4, 4).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).bfloat16())


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_float32_products_are_onednns_and_compute_the_same(shape):
    model, x = Products().requires_grad_(False), torch.randn(shape)
    program = torch.export.export(model, (x,), strict=False)
    use_onednn(program)
    targets = [node.target for node in program.graph.nodes]
    assert [t for t in targets if t in (PRODUCT, ONEDNN_PRODUCT)] == [
        ONEDNN_PRODUCT, ONEDNN_PRODUCT, PRODUCT
    ]  # fmt: skip
    torch.testing.assert_close(program.module()(x), model(x))


def test_nothing_is_left_where_it_was_started(tmp_path):
    """Inductor makes its folder when it is imported: only where the request says."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    code = (
        "from pathlib import Path; from lcexport.builder.aoti_worker import use_folder\n"
        f"use_folder(Path({str(work)!r}))\n"
        "import lcexport.builder.aoti_attention"
    )
    here = {"TMPDIR": str(elsewhere), "PATH": os.environ["PATH"]}
    subprocess.run((sys.executable, "-c", code), check=True, env=here)
    assert list(elsewhere.iterdir()) == []
    assert (work / "inductor").is_dir()


def test_a_torch_without_onednn_keeps_its_own(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    program = torch.export.export(Products(), (torch.randn(5, 8),), strict=False)
    use_onednn(program)
    assert ONEDNN_PRODUCT not in [node.target for node in program.graph.nodes]
