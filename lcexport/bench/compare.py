"""A run against an earlier one of the same work on the same device."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcexport.configs.errors import IncompatibleError, InputError, UsageError

# What a regression is looked for in. A cold start and a load are one reading each: too few.
METRICS: dict[str, tuple[str, ...]] = {
    "step": ("step", "median_seconds"),
    "engine": ("engine", "median_seconds"),
    "text": ("text", "median_seconds"),
    "cache": ("cache", "median_seconds"),
    "decode": ("decode", "median_seconds"),
    "request": ("requests", "median_seconds"),
    "host memory": ("host_peak_bytes",),
    "device memory": ("device_peak_bytes",),
    "files": ("files", "total_bytes"),
}
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One figure of one contestant, then and now; `change` is 0.1 for a tenth more."""

    contestant: str
    metric: str
    old: float
    new: float
    change: float
    regressed: bool


def limit_from(text: str) -> float:
    """How much worse a figure may be, as a share: 0.08 of `8%` or `8`.

    Raises:
        UsageError: no percentage, or a negative one.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*%?", text.strip())
    if not found:
        raise UsageError("not a limit", got=repr(text), wanted="a percentage such as 8%")
    return float(found[1]) / 100


def read_old(path: Path, schema_version: int) -> Document:
    """An earlier run's JSON.

    Raises:
        InputError: it is not there, or no JSON of `lcexport bench`.
        IncompatibleError: it has another schema version.
    """
    try:
        old = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON: {error}", do="Make it: lcexport bench BUNDLE --json > OLD.json"
        ) from error
    if not isinstance(old, dict) or old.get("kind") != "bench":
        raise InputError(f"{path} is not what `lcexport bench --json` prints")
    if old.get("schema_version") != schema_version:
        raise IncompatibleError(
            f"{path} has another schema version", got=old.get("schema_version"),
            wanted=schema_version, do="Measure again with this lcexport.",
        )  # fmt: skip
    parts = {"device": dict, "subject": dict, "options": dict, "contestants": list}
    for name, kind in parts.items():
        if not isinstance(old.get(name), kind):
            raise InputError(f"{path} is not whole", got=f"no {name}", do="Measure again.")
    for one in old["contestants"]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise InputError(f"{path} is not whole", got="a contestant without a name")
    return old


def check_comparable(old: Document, new: Document) -> None:
    """Refuse a run on another device, of other work, or without a contestant in common.

    `new` needs no figures yet: this is asked before anything is measured.

    Raises:
        IncompatibleError: names the first thing that differs.
        InputError: the earlier run has no figures of a contestant.
    """
    for part in ("device", "subject", "options"):
        for name, value in new[part].items():
            if old[part].get(name, False) != value:  # what nobody could ask for was not asked for
                raise IncompatibleError(
                    f"the earlier run is of another {part}",
                    got=f"{name} {old[part].get(name)}",
                    wanted=f"{name} {value}",
                    do="Compare runs of one machine, one size and the same options.",
                )
    pairs = list(pairs_of(old, new))
    if not pairs:
        raise IncompatibleError(
            "the earlier run has none of these contestants",
            got=", ".join(str(one.get("name")) for one in old["contestants"]),
            wanted=", ".join(one["name"] for one in new["contestants"]),
        )
    for then, now in pairs:
        for name in ("backend", "batch", "precision", "weights_dtype"):
            if then.get(name) != now[name]:
                raise IncompatibleError(
                    f"{now['name']} is not what it was in the earlier run",
                    got=f"{name} {then.get(name)}",
                    wanted=f"{name} {now[name]}",
                )
        if not any((figure(then, path) or 0) > 0 for path in METRICS.values()):
            raise InputError(
                f"the earlier run has no figures of {now['name']}", do="Measure again."
            )


def pairs_of(old: Document, new: Document) -> Iterator[tuple[Document, Document]]:
    """(then, now) of each contestant that both runs have."""
    earlier = {one.get("name"): one for one in old["contestants"]}
    for now in new["contestants"]:
        if now["name"] in earlier:
            yield earlier[now["name"]], now


def changes(old: Document, new: Document, limit: float) -> list[Change]:
    """Every figure that both runs have, contestant by contestant.

    Raises:
        IncompatibleError: there is none: nothing would be compared, and nothing be worse.
    """
    found = []
    for then, now in pairs_of(old, new):
        for metric, path in METRICS.items():
            before, after = figure(then, path), figure(now, path)
            if before is None or after is None or before <= 0:
                continue
            change = after / before - 1
            regressed = change > limit
            found.append(Change(now["name"], metric, before, after, change, regressed))
    if not found:
        raise IncompatibleError("the two runs have no figure in common", do="Measure both again.")
    return found


def figure(contestant: Document, path: tuple[str, ...]) -> float | None:
    """A number inside a contestant's figures; None where it was not measured."""
    value: Any = contestant
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if number else None
