"""Latency of one forward pass, side by side with torch's, and what of the device it uses.

All contestants are timed in this one process, in turn, so that a clock that falls or a neighbour
that wakes up hits all of them. Where the memory does not hold the engine's weights and torch's at
once, one is loaded, timed and freed before the other, and the result says so.
"""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lcexport.eager import DitEngine
from lcexport.engines import Engine
from lcexport.engines.host import release
from lcexport.flops import job_flops
from lcexport.golden import branch_inputs, golden_inputs
from lcexport.qualify.claims import Check, Claim, Result, first_line, judged, measured, untested
from lcexport.qualify.subject import Subject
from lcexport.timing import Run, matrix_products, seconds_of, summary

EAGER = Claim(
    "faster-than-eager",
    "A forward pass of the engine is faster than eager torch's.",
    "Median of passes taken in turn, on the same inputs and device, after warm-up.",
)
COMPILED = Claim(
    "faster-than-compile",
    "A forward pass of the engine is faster than torch.compile's.",
    "As above, against torch.compile of the same module with its default mode.",
)
ARITHMETIC = Claim(
    "arithmetic",
    "The share of the device's matrix arithmetic that a forward pass reaches.",
    "Operations of the pass over its median, against the best of several matrix products of the "
    "model's sizes and precision in the same process.",
)
WARM_UPS = 2
TIMED_SECONDS = 60.0  # what the rounds may take together, within the next two
FEWEST_ROUNDS, MOST_ROUNDS = 7, 30
ROOM = 2.5  # times the weights: the engine's, torch's, and half again for what flows between
PRODUCT_TRIES = 5


@dataclass
class Timed:
    """Seconds of each contestant's passes; how they were taken; why one is missing."""

    seconds: dict[str, list[float]]
    order: str
    missing: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def latency(subject: Subject) -> Iterator[Result]:
    """The three results of one round of timing."""
    timed = time_all(subject)
    figures = {name: summary(seconds) for name, seconds in timed.seconds.items()}
    for claim, rival in ((EAGER, "eager"), (COMPILED, "torch.compile")):
        if subject.backend == "eager":
            yield untested(claim, "eager is what the others are compared with")
        elif rival in timed.missing:
            yield untested(claim, timed.missing[rival])
        else:
            ratio = timed.median(rival) / timed.median("engine")
            pair: dict[str, object] = {name: figures[name] for name in ("engine", rival)}
            got = {"ratio_of_medians": ratio, "order": timed.order, **pair}
            if subject.compiled and subject.on_gpu:
                yield judged(claim, ratio > 1, "ratio of medians > 1", got)
            else:
                yield measured(claim, got, "speed is claimed of compiled engines on GPUs only")
    yield arithmetic(subject, timed.median("engine"))


def time_all(subject: Subject) -> Timed:
    """Time the engine, eager torch and torch.compile: in turn, or one after another."""
    groups = (engine_runs, torch_runs)
    needed = ROOM * subject.weights.stat().st_size
    missing: dict[str, str] = {}
    if subject.free_bytes() > needed:
        with ExitStack() as stack:
            runs: dict[str, Run] = {}
            for group in groups:
                runs |= stack.enter_context(group(subject, missing))
            seconds = take_turns(runs, subject.device)
        release()
        return Timed(seconds, "in turn", missing)
    seconds = {}
    for group in groups:
        with group(subject, missing) as runs:
            seconds |= take_turns(runs, subject.device)
        del runs
        release()
    return Timed(seconds, "one after another: the memory does not hold both", missing)


@contextmanager
def engine_runs(subject: Subject, missing: dict[str, str]) -> Iterator[dict[str, Run]]:
    """One pass of the engine."""
    with subject.open() as engine:
        yield {"engine": one_pass(engine)}


@contextmanager
def torch_runs(subject: Subject, missing: dict[str, str]) -> Iterator[dict[str, Run]]:
    """One pass of eager torch, and of torch.compile where it can compile the module here."""
    dit = subject.eager()
    runs = {"eager": one_pass(DitEngine(dit, subject.record, subject.device))}
    compiled: Any = torch.compile(dit)  # shares the weights
    run = one_pass(DitEngine(compiled, subject.record, subject.device))
    try:
        run()
    except Exception as error:  # no compiler, no Triton, a fault of its own: it has many types
        missing["torch.compile"] = f"torch.compile does not work here: {first_line(error)}"
    else:
        runs["torch.compile"] = run
    try:
        yield runs
    finally:
        torch.compiler.reset()  # its caches would keep the weights on the device


def one_pass(engine: Engine) -> Run:
    """The conditional branch of the golden inputs, placed once."""
    host = branch_inputs(golden_inputs(engine), "cond")
    inputs = {name: tensor.to(engine.device).contiguous() for name, tensor in host.items()}
    spec = engine.outputs[0]
    output = torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
    return lambda: engine.run(inputs, {spec.name: output})


def take_turns(runs: Mapping[str, Run], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, one after another in every round; as many rounds as time allows."""
    warm_ups = [sum(seconds_of(run, device) for run in runs.values()) for _ in range(WARM_UPS)]
    rounds = min(max(int(TIMED_SECONDS / warm_ups[-1]), FEWEST_ROUNDS), MOST_ROUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def arithmetic(subject: Subject, seconds: float) -> Result:
    """Operations per second of a pass, beside those of a matrix product alone."""
    record, config = subject.record, subject.config
    flops = job_flops(config, record.job)
    operations = flops.total * record.batch
    peak = matrix_peak(subject)
    got: dict[str, object] = {
        "operations": operations,
        "tflops": operations / seconds / 1e12,
        "matrix_product_tflops": peak / 1e12,
        "share": operations / seconds / peak,
    }
    return measured(ARITHMETIC, got)


def matrix_peak(subject: Subject) -> float:
    """Operations per second of the fastest of the model's large products, best of several."""
    rows = subject.record.job.tokens * subject.record.batch
    all_products = matrix_products(subject.config, rows, subject.bulk, subject.device)
    return max(
        products.per_second(subject.device)
        for products in all_products
        for _ in range(PRODUCT_TRIES)
    )


CHECKS = (Check((EAGER, COMPILED, ARITHMETIC), latency),)
