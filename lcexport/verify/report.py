"""What a verification found: rows of measurements with the thresholds they are held against."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from lcexport.compare import Difference, Tolerance
from lcexport.configs.errors import UsageError

Level = Literal["hash", "load", "module", "step", "video"]
LEVELS: tuple[Level, ...] = get_args(Level)  # each includes the ones before it
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One row. `ok` None: not run here, or compared with nothing but itself; `wanted` says why."""

    level: Level
    resolution: str
    backend: str
    name: str
    got: dict[str, float]
    wanted: str
    ok: bool | None


@dataclass(frozen=True)
class Report:
    """Every row of one verification."""

    bundle: str
    level: Level
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No row failed."""
        return not any(check.ok is False for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.ok is False]

    def as_dict(self) -> dict[str, object]:
        return {"schema_version": SCHEMA_VERSION, "ok": self.ok, **asdict(self)}


def compared(
    level: Level,
    resolution: str,
    backend: str,
    name: str,
    found: Difference,
    tolerance: Tolerance,
) -> Check:
    """A row that holds a difference against a tolerance.

    Eager torch made the reference: where it agrees with itself, that is no proof and not called ok.
    """
    wanted = f"relative_l2 <= {tolerance.relative_l2:g}, cosine >= {tolerance.cosine:g}"
    ok = tolerance.holds(found)
    if ok and backend == "eager":
        why = "not checked: eager torch, against the outputs it gave when the bundle was built"
        return Check(level, resolution, backend, name, found.as_dict(), why, None)
    return Check(level, resolution, backend, name, found.as_dict(), wanted, ok)


def levels_up_to(level: str) -> tuple[Level, ...]:
    """`level` and every level before it."""
    if level not in LEVELS:
        raise UsageError("unknown level", got=repr(level), wanted=f"one of {', '.join(LEVELS)}")
    return LEVELS[: LEVELS.index(level) + 1]
