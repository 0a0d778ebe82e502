"""Each call of the graph on its own, in ONNX Runtime, against the torch module it was traced from.

An error in the whole network says little about where it comes from. Here every call gets the
inputs that torch's own previous modules produce, so each row is that module's own error.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.tasks import Job
from lcexport.dit.model import LongCatDiT
from lcexport.dit.sparse import job_sparsity
from lcexport.eager import dit_from_files, keys_values
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS
from lcexport.engines.ort import graph_file
from lcexport.graph.inference import nested_functions
from lcexport.verify.report import Check, compared

BACKEND = "onnxruntime"


def check_modules(bundle: Bundle, resolution: str, golden: dict[str, Tensor]) -> Iterator[Check]:
    """One row for each output of Embed, each block and the final layer.

    ONNX Runtime has no bfloat16 on processors: for such a bundle there is one row that says so.
    """
    if bundle.manifest.precision != "fp32":
        why = "not checked: ONNX Runtime computes no bfloat16 on processors"
        yield Check("module", resolution, BACKEND, "all modules", {}, why, None)
        return
    dit = dit_from_files(bundle.path(DIT_CONFIG), bundle.path(WEIGHTS))
    record = bundle.graph(resolution)
    graph = ir.load(bundle.path(graph_file(record, "cpu")))
    nodes = list(graph.graph)
    weights = load_file(bundle.path(WEIGHTS))  # mapped; int8 ones as they are stored
    tolerance = STEP_TOLERANCE["fp32"]
    for node, (inputs, wanted) in zip(nodes, torch_modules(dit, golden, record.job), strict=True):
        got = run_call(graph, node, inputs, weights)
        for value, found, reference in zip(node.outputs, got, wanted, strict=True):
            name = str(value.name)
            yield compared(
                "module", resolution, BACKEND, name, difference(found, reference), tolerance
            )


def torch_modules(
    dit: LongCatDiT, golden: dict[str, Tensor], job: Job
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(inputs, outputs) of each module in order, computed by torch."""
    with torch.inference_mode():
        yield from (cache_modules if job.part == "cache" else denoise_modules)(dit, golden, job)


def denoise_modules(
    dit: LongCatDiT, golden: dict[str, Tensor], job: Job
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Embed, the blocks and the final layer."""
    latents, text_in = golden["hidden_states"], golden["text_cond"]
    timestep, mask = golden["timestep"], golden["mask_cond"]
    cache = keys_values(golden) if job.cached_latents else None
    geometry = dit.geometry(latents, timestep, job.num_cond_latents, cache)
    geometry = replace(geometry, sparse=job_sparsity(dit.config, job))
    cos, sin, frequencies = dit.tables(geometry, latents.device)
    x, text, time = dit.embed(latents, text_in, timestep, mask, frequencies)
    text_mask = dit.text_mask(mask)
    shared = [text, time, cos, sin] + ([] if text_mask is None else [text_mask])
    yield [latents, text_in, timestep, mask], [x, *shared]
    for layer, block in enumerate(dit.layers):
        past = None if cache is None else cache[layer]
        inputs = [x, *shared, *(past or ())]
        x = block(x, text, time, cos, sin, text_mask, geometry, past)
        yield inputs, [x]
    yield [x, time], [dit.final_layer(x, time, geometry)]


def cache_modules(
    dit: LongCatDiT, golden: dict[str, Tensor], job: Job
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Embed, the blocks, and the last one's keys and values."""
    latents, timestep = golden["hidden_states"], golden["timestep"]
    geometry = dit.geometry(latents, timestep, 0)
    cos, sin, frequencies = dit.tables(geometry, latents.device)
    x, time = dit.embed_frames(latents, timestep, frequencies)
    yield [latents, timestep], [x, time, cos, sin]
    for block in dit.layers[:-1]:
        inputs = [x, time, cos, sin]
        x, key, value = block.caching(x, time, cos, sin, geometry)
        yield inputs, [x, key, value]
    yield [x, time], list(dit.layers[-1].last_caching(x, time, geometry))


def run_call(
    graph: ir.Model, node: ir.Node, activations: list[Tensor], weights: dict[str, Tensor]
) -> list[Tensor]:
    """Run one call of the main graph as a model of its own; its weights become inputs."""
    feeds: dict[str, np.ndarray] = {}
    inputs = []
    for index, value in enumerate(node.inputs):
        assert value is not None
        name = str(value.name)
        tensor = activations[index] if index < len(activations) else weights[name]
        feeds[name] = tensor.detach().numpy()
        inputs.append(ir.Value(name=name, shape=value.shape, type=value.type))
    outputs = [ir.Value(name=str(o.name), shape=o.shape, type=o.type) for o in node.outputs]
    copy = ir.Node(node.domain, node.op_type, inputs, outputs=outputs, name=node.name)
    alone = ir.Model(
        ir.Graph(inputs, outputs, nodes=[copy], opset_imports=graph.graph.opset_imports),
        ir_version=graph.ir_version,
        functions=nested_functions(graph.functions, [node]),
    )
    session = ort.InferenceSession(
        ir.to_proto(alone).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(array) for array in session.run(None, feeds)]
