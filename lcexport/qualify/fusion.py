"""Fused attention and float32 islands in the built engine, as TensorRT's inspector tells them."""

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from lcexport.checkpoint import is_island
from lcexport.engines.files import write_bytes
from lcexport.engines.manifest import EngineRecord
from lcexport.engines.trt.inspector import EngineLayers, islands_of, read_layers, rounded
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.graph.precision import NORM_OPS, PRODUCTS
from lcexport.qualify.claims import Check, Claim, Result, judged, untested
from lcexport.qualify.subject import Subject

FUSED = Claim(
    "fused-attention",
    "Every dense attention runs as one fused kernel, so that none of its scores is ever stored.",
    "Kernels with mha in their name, counted by the engine's inspector, plan by plan.",
)
ISLANDS = Claim(
    "float32-islands",
    "Modulation, norms, the timestep's path and the last projection are float32 in the engine.",
    "Types that the inspector tells of the layers made of nothing but those operations. What "
    "TensorRT fused with something else shows the whole's types, and is not counted.",
)
SHOWN = 5


def inspected(subject: Subject) -> Iterator[Result]:
    """Both claims, from one look at the engine. The inspector's own words are left as files."""
    record = subject.engine_record
    if record is None or not subject.tensorrt:
        for claim in (FUSED, ISLANDS):
            yield untested(claim, f"{subject.backend} has no inspector")
        return
    with subject.open() as engine:
        assert isinstance(engine, TrtEngine)
        texts = engine.inspect()
    for index, text in enumerate(texts):
        write_bytes(subject.folder / f"layers-{index:02d}.json", text.encode())
    plans = [read_layers(text) for text in texts]
    if not all(plan.detailed for plan in plans):
        for claim in (FUSED, ISLANDS):
            yield untested(
                claim, "the inspector tells names only: built without detailed verbosity"
            )
        return
    yield fused(record, plans)
    yield float32(plans, island_nodes(subject.bundle.path(subject.record.file)))


def fused(record: EngineRecord, plans: list[EngineLayers]) -> Result:
    """Plan by plan, as many fused kernels as attentions."""
    found = [len(plan.fused_attentions) for plan in plans]
    wanted = [plan.attentions for plan in record.plans]
    kernels = sorted({layer.kernel for plan in plans for layer in plan.fused_attentions})
    got: dict[str, object] = {
        "fused": sum(found),
        "attentions": sum(wanted),
        "fused_by_plan": found,
        "attentions_by_plan": wanted,
        "layers": sum(len(plan.layers) for plan in plans),
        "kernels": kernels[:SHOWN],
    }
    return judged(FUSED, found == wanted, f"{sum(wanted)}: one for each dense attention", got)


def float32(plans: list[EngineLayers], nodes: frozenset[str]) -> Result:
    """No layer of an island alone takes or gives less than float32."""
    layers = [layer for plan in plans for layer in islands_of(plan.layers, nodes)]
    if not layers:
        return untested(ISLANDS, "the inspector tells of no layer that is part of an island alone")
    low = [layer.name for layer in rounded(layers)]
    got: dict[str, object] = {"layers_told": len(layers), "lower": low[:SHOWN]}
    why = f"{len(low)} lower than float32" if low else ""
    return judged(ISLANDS, not low, "0 layers lower than float32", got, why)


def island_nodes(graph: Path) -> frozenset[str]:
    """The graph's norms, and its products with islands' weights, as TensorRT names them."""
    model = ir.load(graph)
    found = set()
    for call in model.graph:
        function = model.functions[call.op_identifier()]
        given = zip(function.inputs, call.inputs, strict=True)
        islands = {own for own, value in given if value is not None and is_island(str(value.name))}
        for node in function:
            product = node.op_type in PRODUCTS and not islands.isdisjoint(node.inputs)
            if product or node.op_type in NORM_OPS:
                # The call is the block's own, or the function's where its weights are handed in.
                found |= {f"{node.name} | {c} ({call.op_type})" for c in (call.name, call.op_type)}
    return frozenset(found)


CHECKS = (Check((FUSED, ISLANDS), inspected),)
