"""The command that builds a bundle's plans anew for the machine at hand."""

import shlex

from lcexport.configs.tasks import build_words
from lcexport.engines import TENSORRT
from lcexport.engines.manifest import EngineRecord, Manifest
from lcexport.engines.trt.options import TrtOptions

# lcexport wraps none of these: it sets no option of ONNX Runtime that fills a plan or lets it run
# code of its own.
NOT_WRAPPED = frozenset({"strip_plan", "version_compatible"})


def rebuild_command(
    manifest: Manifest,
    product: str,
    name: str,
    compute_capability: str | None = None,
    *,
    wrapped_for: str | None = None,
    device: str = "cuda",
    compile_components: bool = False,
) -> str:
    """What to type. CHECKPOINT and NEW are left for the reader, who knows the folders.

    Args:
        name: of the graph.
        compute_capability: of the GPU at hand, for plans that were compiled for others.
        wrapped_for: the backend of ONNX Runtime that is to run the plans.
        device: what they are to run on.
        compile_components: with the text encoder and the VAE's decoder, whether or not the build
            of this graph compiled them.
    """
    record, graph = manifest.engines[product][name], manifest.graphs[name]
    wrapped = wrapped_for is not None or record.ep_context is not None
    backends = ",".join(filter(None, [product, wrapped_for]))
    resolution, task = graph.preset.name, graph.job.task
    built = manifest.options_for(resolution, task)
    words = ["lcexport", "build", "--model", "CHECKPOINT", *build_words(resolution, task, built)]
    words += ["--backend", backends, "--device", device]
    if built.get("only") == "compile":
        words += ["--only", "compile"]
    if product in TENSORRT:
        words += plans_words(record, product, wrapped)
        words += targets_words(record, compute_capability)
    words += ["--ep-context"] if wrapped else []
    compiled = compile_components or built.get("compile_components")
    words += ["--compile-components"] if compiled else []
    return shlex.join([*words, "-o", "NEW"])


def plans_words(record: EngineRecord, product: str, wrapped: bool) -> list[str]:
    """How many plans, where their weights are, and TensorRT's options that are not the defaults."""
    words = []
    if record.calls and not wrapped:
        words += ["--weights", "shared"]
    elif wrapped and product == "tensorrt":
        words += ["--segments", "1"]
    elif not record.calls:
        words += ["--segments", str(len(record.plans))]
    for name, value in record.options.items():
        field = TrtOptions.model_fields.get(name)
        if name == "compute_capabilities" or field is None or value == field.default:
            continue
        if not (wrapped and name in NOT_WRAPPED):
            words += ["--trt", f"{name}={value}"]
    return words


def targets_words(record: EngineRecord, here: str | None) -> list[str]:
    """The GPUs that were named when the plans were compiled, and the one at hand."""
    named = record.options.get("compute_capabilities")
    if not isinstance(named, list | tuple) or not named:
        return []
    return ["--targets", ",".join(dict.fromkeys([*map(str, named), *filter(None, [here])]))]
