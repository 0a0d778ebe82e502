"""The two graphs of a continuation in ONNX Runtime, against the original's cache and velocity."""

from functools import cache

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lcexport.checkpoint import open_checkpoint, read_header
from lcexport.configs.errors import BuildError
from lcexport.dit import Geometry
from lcexport.graph import (
    GraphSpec,
    onnx_from_cache,
    onnx_from_dit,
    prove_precision,
    save_graph,
)
from lcexport.graph.check import check_graph
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import segment_graph

ATOL = 2e-5  # float32, one forward pass
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def case(golden):
    return golden("dit_tiny_vc_kvcache")


@pytest.fixture(scope="module")
def make_graphs(dit_folder, make_weights):
    """`make_graphs("bf16")` is (the graph that makes a cache, the one that uses it), as saved."""
    config = open_checkpoint(dit_folder).config
    config = config.model_copy(update={"text_tokens_zero_pad": True})

    @cache
    def make(bulk):
        weights = make_weights(bulk)
        tensors = read_header(weights).tensors
        paths = (weights.with_name("cache.onnx"), weights.with_name("cached.onnx"))
        clean = GraphSpec(Geometry(1, 2, 4, 6), 10, DTYPES[bulk])
        save_graph(onnx_from_cache(config, clean, tensors, "0"), paths[0])
        noisy = GraphSpec(Geometry(2, 3, 4, 6, cached_latents=2), 10, DTYPES[bulk])
        save_graph(onnx_from_dit(config, noisy, tensors, "0"), paths[1])
        return paths

    return make


@pytest.mark.parametrize("form", ["as exported", "fused"])
def test_the_originals_cache_and_what_comes_of_it(make_graphs, fuse, case, form):
    paths = make_graphs("fp32")
    paths = map(fuse, paths) if form == "fused" else paths
    maker, user = (ort.InferenceSession(path) for path in paths)
    clean = {"hidden_states": case["cond_latents"], "timestep": torch.zeros(1, 2)}
    names = [output.name for output in maker.get_outputs()]
    assert names == ["key.0", "value.0", "key.1", "value.1", "key.2", "value.2"]
    made = maker.run(None, {name: tensor.numpy() for name, tensor in clean.items()})
    cached = dict(zip(names, map(torch.from_numpy, made), strict=True))
    for layer in range(3):
        for kind, letter in (("key", "k"), ("value", "v")):
            wanted = case[f"kv.{layer}.{letter}"]
            torch.testing.assert_close(cached[f"{kind}.{layer}"], wanted, rtol=0, atol=ATOL)
    inputs = {
        "hidden_states": case["noise_latents"],
        "encoder_hidden_states": case["encoder_hidden_states"],
        "timestep": case["timestep"],
        "encoder_attention_mask": case["encoder_attention_mask"].bool(),
        **{name: tensor.expand(2, -1, -1, -1) for name, tensor in cached.items()},
    }
    (velocity,) = user.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(velocity), case["output"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("bulk", ["fp32", "bf16"])
def test_both_keep_the_precision(make_graphs, bulk):
    maker, user = map(ir.load, make_graphs(bulk))
    proved = prove_precision(maker, DTYPES[bulk], attentions=1)
    assert (proved["calls_of_cacheblock"], proved["calls_of_cachelast"]) == (2, 1)
    assert proved["attentions_bulk"] == 2
    assert prove_precision(user, DTYPES[bulk])["attentions_bulk"] == 6
    with pytest.raises(BuildError, match="another number"):
        prove_precision(maker, DTYPES[bulk], attentions=2)


def test_an_island_of_the_cache_in_low_precision_is_found(make_graphs):
    model = ir.load(make_graphs("bf16")[0])
    block = next(f for f in model.functions.values() if f.name == "CacheBlock")
    cast = next(
        node
        for node in block
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT
    )
    cast.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.BFLOAT16))
    with pytest.raises(BuildError, match="CacheBlock"):
        prove_precision(model, torch.bfloat16, attentions=1)


@pytest.mark.parametrize("target", ["tensorrt-10", "tensorrt-11", "tensorrt-rtx"])
def test_tensorrt_would_take_both(make_graphs, target):
    for path in make_graphs("bf16"):
        assert check_graph(ir.load(path), target) == []


def test_a_cache_graph_is_cut_and_parted_like_any(make_graphs):
    maker, user = map(ir.load, make_graphs("bf16"))
    first, second = segment_graph(maker, 2)
    assert [spec.name for spec in first.outputs if spec.name.startswith(("key", "value"))] == [
        "key.0", "value.0", "key.1", "value.1",
    ]  # fmt: skip
    assert [spec.name for spec in second.outputs] == ["key.2", "value.2"]
    parts, calls = parts_of(maker)
    assert [part.name for part in parts] == ["CacheEmbed", "CacheBlock", "CacheLast"]
    assert calls[1].tensors["key"] == "key.0"
    _, calls = parts_of(user)
    assert calls[2].tensors["cached_value"] == "value.1"
