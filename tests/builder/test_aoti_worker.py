"""What is compiled: the traced program, its float32 products oneDNN's."""

import pytest
import torch
from torch import Tensor, nn

from lcexport.builder.aoti_worker import ONEDNN_PRODUCT, PRODUCT, use_onednn


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


def test_a_torch_without_onednn_keeps_its_own(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    program = torch.export.export(Products(), (torch.randn(5, 8),), strict=False)
    use_onednn(program)
    assert ONEDNN_PRODUCT not in [node.target for node in program.graph.nodes]
