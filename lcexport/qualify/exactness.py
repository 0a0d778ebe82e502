"""What must be equal bit by bit: rows of equal input, runs of equal input, weights put back."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lcexport.engines.manifest import EngineRecord
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.engines.weights import map_weights
from lcexport.golden import golden_inputs, run_branch
from lcexport.qualify.claims import Check, Claim, Result, judged, untested
from lcexport.qualify.subject import Subject

ROWS = Claim(
    "identical-rows",
    "Equal rows of a batch give equal results.",
    "A batch whose rows are all the same sample: every row of the output against the first.",
)
REPEATED = Claim(
    "repeatable",
    "The same input gives the same output, bit by bit.",
    "Two runs in a row, then a third after a run on another input.",
)
REFIT = Claim(
    "refit",
    "Weights are exchanged for others and back, exactly.",
    "Refit with one weight negated, then with the bundle's own: once for a product of the bulk, "
    "once for the last projection. The first must change the output, the second restore it.",
)
EXACT = "0 elements differ, all finite"


def differing(found: Tensor, wanted: Tensor) -> int:
    """How many elements have other bits, or are no numbers. Both float32, of one shape."""
    other = found.view(torch.int32) != wanted.view(torch.int32)
    return int((other | ~found.isfinite()).sum())


def identical_rows(subject: Subject) -> Iterator[Result]:
    batch = subject.record.batch
    if batch < 2:
        yield untested(ROWS, "the engine's batch is 1: build one with --batch 2")
        return
    with subject.open() as engine:
        golden = golden_inputs(engine)
        same = {name: t[:1].expand_as(t).contiguous() for name, t in golden.items()}
        output = run_branch(engine, same, "cond")
    counts = [differing(row, output[0]) for row in output]
    yield judged(ROWS, not any(counts), EXACT, {"rows": batch, "differing": counts})


def repeatable(subject: Subject) -> Iterator[Result]:
    with subject.open() as engine:
        golden = golden_inputs(engine)
        first, second, other, third = (
            run_branch(engine, golden, branch) for branch in ("cond", "cond", "uncond", "cond")
        )
    got: dict[str, object] = {
        "second_run": differing(second, first),
        "after_other_input": differing(third, first),
        "other_input": differing(other, first),
    }
    holds = not got["second_run"] and not got["after_other_input"]
    if not got["other_input"]:
        yield judged(REPEATED, False, EXACT, got, "another input gave the same output")
        return
    yield judged(REPEATED, holds, EXACT, got)


def refittable(record: EngineRecord) -> bool:
    """Whether the plans' own weights can be set: stripped plans are filled that way."""
    return bool(record.options.get("refit") or record.options.get("strip_plan"))


def refit(subject: Subject) -> Iterator[Result]:
    record = subject.engine_record
    if record is None or not (subject.tensorrt and (refittable(record) or record.calls)):
        yield untested(REFIT, "built without refitting")
        return
    own = map_weights(subject.weights)  # mapped, not read
    middle = subject.config.depth // 2
    got: dict[str, object] = {}
    with subject.open() as engine:
        assert isinstance(engine, TrtEngine)
        golden = golden_inputs(engine)
        before = run_branch(engine, golden, "cond")
        for name in (f"blocks.{middle}.ffn.w2.weight", "final_layer.proj.weight"):
            engine.refit({**own, name: -own[name]})
            changed = differing(run_branch(engine, golden, "cond"), before)
            engine.refit(own)
            restored = differing(run_branch(engine, golden, "cond"), before)
            got[name] = {"changed": changed, "differing_after": restored}
    rows = [dict(row) for row in got.values() if isinstance(row, dict)]
    holds = all(row["changed"] and not row["differing_after"] for row in rows)
    yield judged(REFIT, holds, "the other weights change the output; 0 elements differ after", got)


CHECKS = (
    Check((ROWS,), identical_rows),
    Check((REPEATED,), repeatable),
    Check((REFIT,), refit),
)
