"""Claims, and what became of each: data, from which the JSON and the page are both made."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from lcexport.configs.errors import LcexportError, ResourceError
from lcexport.qualify.subject import Subject

# `measured` is a figure that is held against nothing.
Verdict = Literal["proven", "refuted", "measured", "not tested"]


@dataclass(frozen=True)
class Claim:
    """What is claimed in one sentence, and how that is tested in another."""

    id: str
    sentence: str
    test: str


@dataclass(frozen=True)
class Result:
    """One claim's verdict: what was measured, the threshold, and why it is no other verdict."""

    claim: Claim
    verdict: Verdict
    threshold: str = ""
    why: str = ""
    got: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return {
            "id": self.claim.id,
            "claim": self.claim.sentence,
            "test": self.claim.test,
            "verdict": self.verdict,
            "threshold": self.threshold,
            "why": self.why,
            "measured": self.got,
        }


def judged(
    claim: Claim, holds: bool, threshold: str, got: dict[str, object], why: str = ""
) -> Result:
    """A claim that was held against a threshold."""
    return Result(claim, "proven" if holds else "refuted", threshold, why, got)


def measured(claim: Claim, got: dict[str, object], why: str = "") -> Result:
    """A figure."""
    return Result(claim, "measured", why=why, got=got)


def untested(claim: Claim, why: str) -> Result:
    """A claim that could not be put to the test here."""
    return Result(claim, "not tested", why=why)


@dataclass(frozen=True)
class Check:
    """A function that yields the results of some claims."""

    claims: tuple[Claim, ...]
    run: Callable[[Subject], Iterator[Result]]


def results_of(check: Check, subject: Subject) -> list[Result]:
    """Every claim's result, also where the check ends with an error: the others still run.

    An error of lcexport is an answer: the engine did not do it. A fault of the check itself is
    none; its traceback is kept, for it may have taken hours to come to it.
    """
    results: list[Result] = []
    try:
        results.extend(check.run(subject))
    except (MemoryError, torch.OutOfMemoryError, ResourceError) as error:
        results += [
            untested(claim, f"out of memory: {first_line(error)}") for claim in check.claims
        ]
    except LcexportError as error:
        results += [Result(claim, "refuted", why=str(error)) for claim in check.claims]
    except Exception as error:
        fault: dict[str, object] = {"traceback": traceback.format_exc()}
        why = f"the check itself failed: {first_line(error)}"
        results += [Result(claim, "not tested", why=why, got=fault) for claim in check.claims]
    first: dict[Claim, Result] = {}
    for result in results:  # what was found before the error stands
        first.setdefault(result.claim, result)
    return list(first.values())


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
