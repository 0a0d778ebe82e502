"""Reading torch's translations once changes no graph."""

import onnx
import torch
from torch import nn
from torch.onnx._internal._lazy_import import onnxscript_apis  # pyright: ignore[reportPrivateImportUsage]
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lcexport.graph.exporter import known_operators, quiet_exporter, registry, torchlib


class Gated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * x


def exported() -> onnx.ModelProto:
    with quiet_exporter():
        program = torch.onnx.export(Gated().eval(), (torch.ones(2, 3),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def test_the_graph_is_the_same_and_torch_is_left_as_it_was():
    wanted, original = exported(), ONNXRegistry.from_torchlib
    with known_operators():
        assert exported().graph == wanted.graph
        with known_operators():
            assert exported().graph == wanted.graph
    assert ONNXRegistry.from_torchlib == original


def test_the_translations_are_read_once(monkeypatch):
    read = onnxscript_apis.get_torchlib_ops
    calls = []
    monkeypatch.setattr(onnxscript_apis, "get_torchlib_ops", lambda: calls.append(1) or read())
    torchlib.cache_clear()
    with known_operators():
        exported()
        exported()
    assert len(calls) == 1
    exported()
    assert len(calls) == 2


def test_what_an_export_adds_is_its_own():
    before = registry(23)
    before.register_op(torch.ops.aten.silu.default, lambda x: x)
    name = torch.ops.aten.silu.default.name()
    assert len(before.functions[name]) == len(registry(23).functions[name]) + 1
    assert registry(23).functions[name] == torchlib(23).functions[name]
    assert registry(23).opset_version == torchlib(23).opset_version == 23
