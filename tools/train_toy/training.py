"""One training loop for all the parts: seeded, and resumed exactly where it was stopped.

What a step is trained on depends on its number alone, so nothing but weights and the optimiser's
moments has to be kept.
"""

import fcntl
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lcexport.configs.errors import UsageError

log = logging.getLogger(__name__)

SAVE_EVERY = 200  # steps
LOG_EVERY = 20


@dataclass(frozen=True)
class Plan:
    """How long a part is trained, and how hard."""

    steps: int
    rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.0  # how much of the averaged weights each step keeps; 0 for none
    full_rate: str = ""  # is in the names of the parameters that learn at the full rate
    slower: float = 1.0  # how much of the rate the others learn at

    def rate_at(self, step: int) -> float:
        """Up in a line, down in half a cosine to a twentieth."""
        up = min(1.0, (step + 1) / self.warmup)
        down = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.rate * up * (0.05 + 0.95 * down)

    def average_at(self, step: int) -> float:
        """Young averages forget faster."""
        return min(self.average, (step + 1) / (step + 10))


def generator_at(seed: int, *place: int) -> torch.Generator:
    """Random numbers that depend on the place alone, such as a step's number."""
    mixed = seed
    for number in place:
        mixed = (mixed * 1_000_003 + number + 1) % (2**62)
    return torch.Generator().manual_seed(mixed)


def adam(parameters: Mapping[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """A group for each parameter; decay for matrices and kernels alone."""
    groups = [
        {
            "params": [parameter],
            "share": 1.0 if plan.full_rate in name else plan.slower,
            "weight_decay": plan.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in parameters.items()
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.99))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else makes `path` meanwhile: a second process waits here until the first has ended."""
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for the process that is making %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_other(path: Path, got: object, wanted: object) -> None:
    """UsageError where what a file holds is not what this training would have written."""
    if got != wanted:
        raise UsageError(
            f"{path} is of another training", got=got, wanted=wanted,
            do="Delete it to train that part anew, or name another --out.",
        )  # fmt: skip


class Training:
    """A module in training, and all of it that a file holds."""

    def __init__(
        self, module: nn.Module, plan: Plan, folder: Path, name: str, recipe: str = ""
    ) -> None:
        self.module, self.plan = module, plan
        self.recipe = f"{plan} {recipe}".strip()  # what a file must be of to be continued
        self.state_path = folder / f"{name}.training.safetensors"
        self.log_path = folder / f"{name}.jsonl"
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = adam(self.parameters, plan)
        self.averaged = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.step = 0

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps

    def run(self, loss_at: Callable[[int], dict[str, Tensor]]) -> None:
        """Train to the end from where the file says, alone.

        `loss_at(step)` gives the parts of the loss, which are added.

        Raises:
            UsageError: the file is of another plan or recipe.
        """
        with alone(self.state_path):
            if self.state_path.exists():
                self.restore()
            self.finish(loss_at)

    def finish(self, loss_at: Callable[[int], dict[str, Tensor]]) -> None:
        """The steps that are left."""
        seconds = time.perf_counter()
        while not self.done:
            parts = loss_at(self.step)
            self.advance(sum(parts.values(), torch.zeros(())))
            if self.step % LOG_EVERY == 0:
                numbers = {name: round(float(value.detach()), 6) for name, value in parts.items()}
                spent = (time.perf_counter() - seconds) / LOG_EVERY
                self.write_log({"step": self.step, **numbers, "seconds": round(spent, 3)})
                seconds = time.perf_counter()
            if self.step % SAVE_EVERY == 0 or self.done:
                self.save()

    def advance(self, loss: Tensor) -> None:
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.plan.rate_at(self.step)
        self.optimizer.step()
        keep = self.plan.average_at(self.step)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.averaged[name].lerp_(parameter, 1 - keep)
        self.step += 1

    def write_log(self, line: dict[str, float]) -> None:
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Whole or not at all: a killed training goes on from the last one."""
        tensors = {f"parameter.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"averaged.{n}": p for n, p in self.averaged.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        temporary = self.state_path.with_suffix(".part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary,
                  metadata={"step": str(self.step), "plan": self.recipe})  # fmt: skip
        temporary.rename(self.state_path)

    def restore(self) -> None:
        with safe_open(self.state_path, "pt") as file:
            metadata = file.metadata()
            if "plan" in metadata:  # older ones do not say
                refuse_other(self.state_path, metadata["plan"], self.recipe)
            self.step = int(metadata["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.assign({n: tensors.pop(f"parameter.{n}") for n in self.parameters})
        self.averaged = {n: tensors.pop(f"averaged.{n}") for n in self.parameters}
        for place, value in tensors.items():
            key, name = place.split(".", 1)
            self.optimizer.state[self.parameters[name]][key] = value
        log.info("resumed at step %d: %s", self.step, self.state_path)

    def assign(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


def read_log(path: Path) -> list[dict[str, float]]:
    """What `write_log` wrote; after a resumed stop the later lines count."""
    lines = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return list({line["step"]: line for line in lines}.values())
