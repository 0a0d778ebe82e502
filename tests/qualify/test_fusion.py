"""Fused attention and islands: what the inspector tells decides, and only that."""

import json

import pytest

from lcexport.engines.trt.inspector import EngineLayer, EngineLayers
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.qualify.claims import results_of
from lcexport.qualify.fusion import CHECKS, FUSED, float32, island_nodes

(CHECK,) = CHECKS


def test_attention_that_is_not_fused_is_refuted(subject_of, double_bundle, the_double):
    the_double.failures.add("EngineInspector.fused")
    found, islands = results_of(CHECK, subject_of(double_bundle, "tensorrt"))
    assert found.claim is FUSED
    assert found.verdict == "refuted"
    assert (found.got["fused"], found.got["attentions"]) == (0, 8)
    assert islands.verdict == "proven"


@pytest.mark.parametrize(
    ("text", "verdict", "why"),
    [
        (json.dumps({"Layers": ["a", "b"]}), "not tested", "without detailed verbosity"),
        ("not JSON", "refuted", "gave no JSON"),
    ],
)
def test_an_inspector_that_says_little(
    monkeypatch, subject_of, double_bundle, the_double, tmp_path, text, verdict, why
):
    monkeypatch.setattr(TrtEngine, "inspect", lambda self: (text, text))
    for result in results_of(CHECK, subject_of(double_bundle, "tensorrt")):
        assert result.verdict == verdict
        assert why in result.why
    assert (tmp_path / "layers-01.json").read_text("utf-8") == text  # kept, to be looked at


def test_an_island_in_bfloat16_is_refuted_and_named():
    def made(name: str, dtype: str) -> EngineLayer:
        return EngineLayer(name, "gemm", name, ("norm",), frozenset({dtype}))

    plan = EngineLayers((made("good", "float32"), made("bad", "bfloat16")), ())
    result = float32([plan], frozenset({"norm"}))
    assert result.verdict == "refuted"
    assert result.got == {"layers_told": 2, "lower": ["bad"]}
    assert float32([plan], frozenset({"other"})).verdict == "not tested"


def test_islands_are_norms_and_products_with_their_weights(subject_of, pair_bundle):
    subject = subject_of(pair_bundle)
    nodes = island_nodes(subject.bundle.path(subject.record.file))
    assert "node_linear | blocks.3 (Block)" in nodes  # the modulation
    assert "node_linear_1 | final_layer (Final)" in nodes  # the last projection
    assert "node_linear_1 | embed (Embed)" in nodes  # the timestep's path
    assert "node_layer_norm_2 | blocks.0 (Block)" in nodes
    assert "node_linear_1 | blocks.3 (Block)" not in nodes  # queries
    assert "node_linear | embed (Embed)" not in nodes  # patches
    assert not [node for node in nodes if "attention" in node]
