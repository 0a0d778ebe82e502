"""The table of names counts up to the released model and covers the golden one."""

import math
from pathlib import Path

import pytest

from lcexport.checkpoint import Naming, expected_tensors, is_island
from lcexport.checkpoint.names import depth_of, name_pairs, naming_of
from lcexport.configs.dit import DiTConfig

RELEASED = DiTConfig()


@pytest.mark.parametrize(("naming", "count"), [("original", 1022), ("native", 1310)])
def test_the_released_model_has_its_tensors_and_its_parameters(naming: Naming, count: int) -> None:
    tensors = expected_tensors(RELEASED, naming)
    assert len(tensors) == count
    assert sum(math.prod(shape) for shape in tensors.values()) == 13_581_071_424


def test_the_golden_model_has_exactly_the_expected_originals(
    dit_folder: Path, weights: dict
) -> None:
    config = DiTConfig.from_json(dit_folder / "config.json")
    assert expected_tensors(config, "original") == {n: tuple(t.shape) for n, t in weights.items()}


@pytest.mark.parametrize(
    ("original", "natives"),
    [
        ("x_embedder.proj.weight", ["patch_embed.proj.weight"]),
        ("t_embedder.mlp.2.bias", ["time_embedder.linear_2.bias"]),
        ("y_embedder.y_proj.0.weight", ["caption_embedder.linear_1.weight"]),
        (
            "blocks.7.attn.qkv.weight",
            [f"blocks.7.self_attn.to_{part}.weight" for part in "qkv"],
        ),
        ("blocks.7.attn.q_norm.weight", ["blocks.7.self_attn.q_norm.weight"]),
        ("blocks.7.attn.proj.bias", ["blocks.7.self_attn.to_out.bias"]),
        (
            "blocks.7.cross_attn.kv_linear.bias",
            [f"blocks.7.cross_attn.to_{part}.bias" for part in "kv"],
        ),
        ("blocks.7.cross_attn.q_linear.bias", ["blocks.7.cross_attn.to_q.bias"]),
        ("blocks.7.pre_crs_attn_norm.bias", ["blocks.7.norm_cross.bias"]),
        ("blocks.7.adaLN_modulation.1.weight", ["blocks.7.adaln_linear_1.weight"]),
        ("blocks.7.ffn.w3.weight", ["blocks.7.ffn.w3.weight"]),
        ("final_layer.linear.weight", ["final_layer.proj.weight"]),
        ("final_layer.adaLN_modulation.1.bias", ["final_layer.adaln_linear.bias"]),
    ],
)
def test_an_original_name_becomes_its_native_ones(original: str, natives: list[str]) -> None:
    pair = next(pair for pair in name_pairs(RELEASED) if pair.original == original)
    assert list(pair.natives) == natives


def test_shapes_are_split_along_the_first_dimension() -> None:
    native = expected_tensors(RELEASED, "native")
    assert native["blocks.0.self_attn.to_k.weight"] == (4096, 4096)
    assert native["blocks.47.cross_attn.to_v.bias"] == (4096,)
    assert native["blocks.0.ffn.w2.weight"] == (4096, 11008)


def test_islands_are_what_the_original_computes_in_fp32() -> None:
    islands = {name for name in expected_tensors(RELEASED, "native") if is_island(name)}
    modules = {name.rpartition(".")[0] for name in islands if not name.startswith("blocks.")}
    assert modules == {
        "time_embedder.linear_1",
        "time_embedder.linear_2",
        "final_layer.proj",
        "final_layer.adaln_linear",
    }
    assert {n for n in islands if n.startswith("blocks.5.")} == {
        f"blocks.5.{module}.{parameter}"
        for module in ("adaln_linear_1", "norm_cross")
        for parameter in ("weight", "bias")
    }
    assert not is_island("blocks.5.self_attn.q_norm.weight")


def test_naming_and_depth_are_seen_from_the_names_alone() -> None:
    small = DiTConfig(depth=3)
    assert naming_of(list(expected_tensors(small, "original"))) == "original"
    assert naming_of(list(expected_tensors(small, "native"))) == "native"
    assert naming_of(["blocks.0.ffn.w1.weight", "transformer.wte.weight"]) is None
    assert depth_of(list(expected_tensors(small, "native"))) == 3
    assert depth_of(["blocks.99.something.weight"]) == 0
