"""The first block at which an engine leaves eager torch.

Each call of the main graph becomes an output: Embed, every block, Final. The engine made of that
graph and eager torch run on the same inputs, and the calls are compared in their order, by
Polygraphy, which is an optional extra. Unlike in the `modules` claim, each block here gets what
the engine itself made before it, and it is the engine's own compiler that is asked.

An output may keep a compiler from fusing across it. An error that comes of such a fusion is then
not found here; it shows in the `step` claim, and not in this one.
"""

import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lcexport.compare import STEP_TOLERANCE, Difference, Tolerance, difference
from lcexport.configs.errors import IncompatibleError
from lcexport.dit import LongCatDiT
from lcexport.engines.host import available_memory_bytes, release
from lcexport.engines.ort import graph_file
from lcexport.engines.trt.product import version_from
from lcexport.golden import branch_inputs, golden_inputs
from lcexport.qualify.claims import Check, Claim, Result, judged, untested
from lcexport.qualify.marked import metadata, ort_runner, trt_runner
from lcexport.qualify.subject import Subject

BISECT = Claim(
    "bisect",
    "No block of the engine leaves the tolerance.",
    "Every block's output in an engine of the same graph with those outputs marked, against eager "
    "torch's, with Polygraphy. The first that is outside is named.",
)
OLDEST = (0, 53)  # older ones, by their source, ask TensorRT 11 for names it no longer has


def require_polygraphy() -> None:
    """Raise IncompatibleError unless a Polygraphy that works with TensorRT 11 is installed."""
    install = "pip install 'lcexport[debug]'"
    wanted = f"{'.'.join(map(str, OLDEST))} or newer"
    if importlib.util.find_spec("polygraphy") is None:
        raise IncompatibleError("Polygraphy is not installed", wanted=wanted, do=install)
    found = version("polygraphy")
    if version_from(found) < OLDEST:
        raise IncompatibleError("Polygraphy is too old", got=found, wanted=wanted, do=install)


def bisect(subject: Subject) -> Iterator[Result]:
    """Compare every marked output, and name the first that is outside."""
    if why := obstacle(subject):
        yield untested(BISECT, why)
        return
    require_polygraphy()
    record = subject.record
    in_ort = subject.backend == "onnxruntime"
    model = ir.load(
        subject.bundle.path(graph_file(record, subject.device) if in_ort else record.file)
    )
    names = mark_calls(model)
    tolerance = STEP_TOLERANCE[subject.bundle.manifest.precision]
    rows = compared(subject, model, names, tolerance)
    outside = [name for name in names if not tolerance.holds(rows[name])]
    first = outside[0] if outside else None
    got: dict[str, object] = {"first_outside": first}
    got |= {name: rows[name].as_dict() for name in names}
    threshold = f"relative_l2 <= {tolerance.relative_l2:g}, cosine >= {tolerance.cosine:g}"
    why = f"the first outside is {first}, of {len(outside)}" if first else ""
    yield judged(BISECT, not outside, threshold, got, why)


def mark_calls(model: ir.Model) -> list[str]:
    """Make the first output of every call an output of the graph; their names, in order.

    The velocity stays the first output, as `prove_precision` expects.
    """
    values = [node.outputs[0] for node in model.graph]
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())
    return [str(value.name) for value in values]


def obstacle(subject: Subject) -> str:
    """Why this engine cannot be bisected here; empty where it can."""
    if subject.backend == "eager":
        return "eager is what the others are compared with"
    if subject.backend == "aotinductor":
        return "only ONNX Runtime and TensorRT are bisected"
    made = subject.engine_record
    if made is not None and made.calls:
        return "its blocks are one plan with other weights: bisect an engine with weights inside"
    if made is not None and made.options.get("sparse_kernel") == "plugin":
        return "its block-sparse attention is a plugin: bisect an engine of the graph's operators"
    if subject.backend == "onnxruntime" and subject.bulk != torch.float32:
        return "ONNX Runtime hands out no bf16 tensors: bisect an fp32 bundle"
    record, config = subject.record, subject.config
    if record.job.part == "cache" or record.job.cached_latents:
        return "only graphs without a key/value cache are bisected: take another of these weights"
    values = record.job.tokens * record.batch * config.hidden_size
    needed = 2 * (config.depth + 2) * values * torch.float32.itemsize
    if (available := available_memory_bytes()) < needed:
        return (
            f"every block's output is held twice in host memory: {needed / 1e9:.1f} GB, of which "
            f"there are {available / 1e9:.1f}; bisect a smaller resolution of the same weights"
        )
    return ""


def compared(
    subject: Subject, model: ir.Model, names: list[str], tolerance: Tolerance
) -> dict[str, Difference]:
    """Run eager torch, free it, run the engine, and compare: Polygraphy drives all three."""
    base: Any = importlib.import_module("polygraphy.backend.base")
    comparator: Any = importlib.import_module("polygraphy.comparator")
    log: Any = importlib.import_module("polygraphy.logger").G_LOGGER
    rows: dict[str, Difference] = {}

    def compare(wanted: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> Any:
        for name in names:
            found, reference = (torch.from_numpy(np.asarray(side[name])) for side in (got, wanted))
            rows[name] = difference(found, reference)
        return OrderedDict((name, tolerance.holds(row)) for name, row in rows.items())

    make = trt_runner if subject.compiled else ort_runner
    with log.verbosity(log.CRITICAL):
        runners = [eager_runner(base, subject, names), make(subject, model, names)]
        results = comparator.Comparator.run(runners, data_loader=[feed(subject)])
        comparator.Comparator.compare_accuracy(results, compare_func=compare)
    return rows


def feed(subject: Subject) -> dict[str, np.ndarray]:
    """The conditional branch of the golden inputs."""
    host = branch_inputs(golden_inputs(subject.record), "cond")
    return {name: tensor.numpy() for name, tensor in host.items()}


def eager_runner(base: Any, subject: Subject, names: list[str]) -> Any:
    """Eager torch as a runner that gives what goes into and comes out of its blocks."""

    class EagerRunner(base.BaseRunner):
        def activate_impl(self) -> None:
            self.dit = subject.eager()

        def deactivate_impl(self) -> None:
            del self.dit
            release()

        def get_input_metadata_impl(self) -> Any:
            return metadata(subject)

        def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
            self.inference_time = 0.0  # nobody asks
            given = {name: torch.from_numpy(np.asarray(a)) for name, a in feed_dict.items()}
            placed = {name: tensor.to(subject.device) for name, tensor in given.items()}
            with torch.inference_mode(), recorded(self.dit) as seen:
                result = self.dit(**placed, num_cond_latents=subject.record.job.num_cond_latents)
            host = [*seen, result.cpu()]
            return OrderedDict((n, t.numpy()) for n, t in zip(names, host, strict=True))

    return EagerRunner(name="eager")


@contextmanager
def recorded(dit: LongCatDiT) -> Iterator[list[torch.Tensor]]:
    """What the first block is given, then what each block returns: float32, on the host."""
    seen: list[torch.Tensor] = []

    def before(block: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0].float().cpu())

    def after(block: torch.nn.Module, given: object, result: torch.Tensor) -> None:
        seen.append(result.float().cpu())

    hooks = [dit.blocks[0].register_forward_pre_hook(before)]
    hooks += [block.register_forward_hook(after) for block in dit.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


CHECKS = (Check((BISECT,), bisect),)
