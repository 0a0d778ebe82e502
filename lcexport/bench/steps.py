"""Guided steps of every contestant in turn, in one process, through the runtime's own loop.

A neighbour that wakes up or a clock that falls then hits all of them, and the matrix products that
they are held against too. Where the memory does not hold all engines at once they are measured one
after another, and the result says so.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch

from lcexport.bench.compiled import COMPILE
from lcexport.bench.subject import EAGER, Contestant, Subject
from lcexport.engines import Engine, TensorSpec, is_cached
from lcexport.engines.host import available_memory_bytes, release
from lcexport.golden import golden_inputs
from lcexport.runtime.cache import KeyValueCache
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.sampler import StepEvent, sample
from lcexport.runtime.schedule import Schedule, schedule
from lcexport.runtime.text import Text
from lcexport.timing import Mark, Products, mark, matrix_products, seconds_between, summary

ROOM = 1.25  # times the weights as they are held: what flows between is in the quarter

OnTurn = Callable[[int, int], None]


class WatchedEngine:
    """An engine whose runs are timed on its device. See `lcexport.engines.Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._marks: list[tuple[Mark, Mark]] = []

    @property
    def backend(self) -> str:
        return self._engine.backend

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.outputs

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        begin = mark(self.device)
        self._engine.run(inputs, outputs)
        self._marks.append((begin, mark(self.device)))

    def take_seconds(self) -> list[float]:
        """Seconds of each run since the last time this was asked."""
        marks, self._marks = self._marks, []
        return [seconds_between(begin, end) for begin, end in marks]

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stepper:
    """A contestant with everything in place to sample one video: seconds of each guided step.

    Attributes:
        steps: seconds of each step, by the clock that a caller with a progress bar sees.
        passes: seconds of the engine's runs in that step, one by one.
    """

    def __init__(self, engine: Engine, contestant: Contestant, guidance_scale: float) -> None:
        job = contestant.graph.job
        clean = job.num_cond_latents
        self.engine, self.contestant = WatchedEngine(engine), contestant
        golden = {name: t[:1] for name, t in golden_inputs(engine, clean).items()}
        cond, uncond = (Text(golden[f"text_{b}"], golden[f"mask_{b}"]) for b in ("cond", "uncond"))
        past = {name: t.to(engine.device) for name, t in golden.items() if is_cached(name)}
        latents = golden["hidden_states"].to(engine.device)
        self._denoiser = Denoiser(
            self.engine,
            cond,
            uncond,
            guidance_scale,
            clean=latents[:, :, :clean] if clean else None,
            cache=KeyValueCache(latents[:, :, :0], (past,), ("", "")) if past else None,
        )
        self._noise = latents[:, :, clean:]
        self.steps: list[float] = []
        self.passes: list[list[float]] = []

    def sample(self, plan: Schedule) -> None:
        """Take the steps of a schedule."""
        with torch.no_grad():
            sample(self._denoiser.velocity, self._noise, plan, self._keep)

    def warm_up(self) -> None:
        """One step that does not count."""
        self.sample(schedule(1))
        self.steps.clear()
        self.passes.clear()

    def _keep(self, event: StepEvent) -> None:
        self.steps.append(event.seconds)
        self.passes.append(self.engine.take_seconds())


Rates = dict[torch.dtype, list[float]]  # operations per second of matrix products, try by try


def measure_steps(
    subject: Subject, steps: int, repeats: int, on_turn: OnTurn | None = None
) -> tuple[dict[str, dict[str, object]], str]:
    """Figures of each contestant by its name, and the order in which they were taken."""
    groups = grouped(subject)
    found: dict[str, dict[str, object]] = {}
    for group in groups:
        found |= measured(group, subject, steps, repeats, on_turn)
        torch.compiler.reset()  # its caches would keep the weights
        release()
    return found, "in turn" if len(groups) == 1 else "one after another: not all fit in memory"


def measured(
    group: Sequence[Contestant], subject: Subject, steps: int, repeats: int, on_turn: OnTurn | None
) -> dict[str, dict[str, object]]:
    """Figures of a group by name. No engine, and so no weights, outlive the call."""
    with ExitStack() as stack:
        steppers = opened(group, subject, stack)
        rates = take_turns(steppers, subject, steps, repeats, on_turn)
        return {
            stepper.contestant.name: figures(stepper, subject, rates[stepper.contestant.dtype])
            for stepper in steppers
        }


def grouped(subject: Subject) -> list[Sequence[Contestant]]:
    """All contestants at once where the memory holds them, each on its own otherwise."""
    on_gpu = subject.device.type == "cuda"
    free = torch.cuda.mem_get_info(subject.device)[0] if on_gpu else available_memory_bytes()
    needed = ROOM * held_bytes(subject)
    return [subject.contestants] if needed < free else [[c] for c in subject.contestants]


def held_bytes(subject: Subject) -> int:
    """The weights of all contestants at once; `opened` lets torch.compile share eager torch's."""
    eager: set[Path] = set()
    total = 0
    for contestant in subject.contestants:
        folder = contestant.bundle.folder
        if contestant.backend == EAGER:
            eager.add(folder)
        if contestant.backend != COMPILE or folder not in eager:
            total += contestant.held_bytes(subject.config, subject.device)
    return total


def opened(group: Sequence[Contestant], subject: Subject, stack: ExitStack) -> list[Stepper]:
    """Open and warm up a group; eager torch and torch.compile share a bundle's weights."""
    eager: dict[Path, Engine] = {}
    steppers = []
    for contestant in group:
        folder = contestant.bundle.folder
        engine = stack.enter_context(contestant.open(subject.device, eager.get(folder)))
        if contestant.backend == EAGER:
            eager[folder] = engine
        stepper = Stepper(engine, contestant, subject.guidance_scale)
        stepper.warm_up()
        steppers.append(stepper)
    return steppers


def take_turns(
    steppers: Sequence[Stepper], subject: Subject, steps: int, repeats: int, on_turn: OnTurn | None
) -> Rates:
    """`repeats` rounds: the matrix products, then a sampling of each; another one first each time.

    Returns operations per second of the fastest product in each round, by dtype.
    """
    batches: dict[torch.dtype, int] = {}
    for one in (stepper.contestant for stepper in steppers):
        batches[one.dtype] = max(one.graph.batch, batches.get(one.dtype, 1))
    products = {dtype: list(products_of(subject, dtype, of)) for dtype, of in batches.items()}
    rates: Rates = {dtype: [] for dtype in products}
    plan = schedule(steps)
    for turn in range(repeats):
        for dtype, tries in products.items():
            rates[dtype].append(max(one.per_second(subject.device) for one in tries))
        first = turn % len(steppers)
        for stepper in (*steppers[first:], *steppers[:first]):
            stepper.sample(plan)
        if on_turn:
            on_turn(turn + 1, repeats)
    return rates


def products_of(subject: Subject, dtype: torch.dtype, batch: int) -> Iterator[Products]:
    """The model's products at the rows of one pass over `batch` samples, each run once."""
    rows = batch * subject.job.tokens
    for products in matrix_products(subject.config, rows, dtype, subject.device):
        products.run()
        yield products


def figures(stepper: Stepper, subject: Subject, rates: Sequence[float]) -> dict[str, object]:
    """What the steps of one contestant come to."""
    in_engine = [sum(passes) for passes in stepper.passes]
    outside = [step - inside for step, inside in zip(stepper.steps, in_engine, strict=True)]
    engine = statistics.median(in_engine)
    per_second = subject.flops.total * subject.branches / engine
    return {
        "step": summary(stepper.steps),
        "step_seconds": stepper.steps,
        "engine": summary(in_engine),
        "engine_runs_per_step": len(stepper.passes[0]),
        "outside": summary(outside),
        "outside_share": statistics.median(outside) / engine,
        "operations_per_second": per_second,
        "matrix_product_operations_per_second": max(rates),
        "matrix_product_median_per_second": statistics.median(rates),
        "share_of_matrix_products": per_second / max(rates),
    }
