"""A bundle's folder to a pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcexport.configs.tasks import task_from
from lcexport.engines import Engine
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.manifest import GraphRecord
from lcexport.runtime.components import Components
from lcexport.runtime.pipeline import Pipeline, first_graph
from lcexport.runtime.residency import Offload


def load(
    bundle_dir: str | Path,
    resolution: str = "480p",
    backend: str = "onnxruntime",
    device: str = "cpu",
    *,
    tasks: Sequence[str] | None = None,
    offload: Offload = "keep",
    engine: Engine | None = None,
    engine_options: Mapping[str, object] | None = None,
    keep_engines: int | None = None,
    vae_tiling: bool = False,
    compiled_components: bool = True,
    check_hashes: bool = False,
) -> Pipeline:
    """Open a bundle for generation.

    Args:
        bundle_dir: the folder that `lcexport build` wrote.
        resolution: which of the bundle's sizes.
        backend: what runs the DiT.
        device: "cpu", "cuda" or "cuda:1"; for the DiT, the text encoder and the VAE alike.
        tasks: whose engines to open now, text-to-video's where None and the bundle has it. Others
            are opened when they are first used.
        offload: where the text encoder and the VAE wait: "keep" on the device, "cpu", or
            "release" to load them for each use.
        engine: use this open engine for text to video; it stays the caller's to close.
        engine_options: how the backend runs its engines; see `lcexport.engines.open_engine`.
        keep_engines: how many engines, one for each graph, stay open; the one used longest ago is
            closed before another is opened. Each holds the weights once more where the backend
            shares none (ONNX Runtime, plans with their weights inside). None for all.
        vae_tiling: encode and decode in overlapping tiles of 256 x 256 pixels: less memory, more
            work, and frames that differ slightly.
        compiled_components: with the backend "aotinductor", use the text encoder and the VAE's
            decoders that the bundle has compiled; False for the library's. Tiles, and frames of a
            size that was not compiled, are decoded by the library, with a warning.
        check_hashes: compare every file's SHA-256, the large ones included.

    Raises:
        UsageError: no such resolution, task, backend, device or policy.
        IntegrityError: no bundle there, or a file that is not the one its manifest names.
        IncompatibleError: the backend's library or the device is missing.
        InputError: the text encoder, tokenizer, VAE or scheduler file is unusable.
    """
    bundle = open_bundle(bundle_dir, every_hash=check_hashes)
    first = first_graph(bundle, resolution)
    graphs = graphs_to_open(bundle, first, tasks)
    if engine is not None:
        graphs = [graph for graph in graphs if graph.name != resolution]
    components = Components(
        bundle, backend, device, offload, first.preset, engine_options, keep_engines, vae_tiling,
        compiled_components,
    )  # fmt: skip
    try:
        if engine is not None:
            components.adopt(bundle.graph(resolution), engine)
        for graph in graphs[:keep_engines]:
            components.engine(graph)
    except BaseException:
        components.close()
        raise
    return Pipeline(components, resolution)


def graphs_to_open(
    bundle: Bundle, first: GraphRecord, tasks: Sequence[str] | None
) -> list[GraphRecord]:
    """The graphs of these tasks in the order of their use: the one that makes a cache first."""
    if tasks is None:
        return [first] if first.job.task == "t2v" else []
    graphs = []
    for task in map(task_from, tasks):
        parts = ("cache", "denoise") if task == "vc" else ("denoise",)
        graphs += [bundle.job_graph(first.preset.name, task, part) for part in parts]
    return graphs
