"""The errors lcexport raises, and the exit code each one becomes on the command line.

Every message answers four questions, as far as they apply: what is wrong, what was got, what
was wanted, what to do. Catch `LcexportError` to catch them all.
"""


class LcexportError(Exception):
    """Base of every error a user can cause or cure.

    Args:
        what: one clause that says what is wrong.
        got: the value that was found.
        wanted: what would have been right.
        do: what the reader can do about it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, got: object = None, wanted: object = None, do: str | None = None
    ) -> None:
        self.what, self.got, self.wanted, self.do = what, got, wanted, do
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if wanted is not None:
            parts.append(f"wanted {wanted}")
        super().__init__("; ".join(parts) + (f". {do}" if do else ""))


class UsageError(LcexportError, ValueError):
    """An argument is out of range or unknown (exit 2)."""

    exit_code = 2


class InputError(LcexportError):
    """A checkpoint, a prompt file or a bundle's content is not what it should be (exit 3)."""

    exit_code = 3


class ResourceError(LcexportError):
    """Disk or memory will not do, or a path cannot be written (exit 4)."""

    exit_code = 4


class IncompatibleError(LcexportError):
    """The environment or the bundle's version does not fit: a missing backend, for one (exit 5)."""

    exit_code = 5


class BuildError(LcexportError):
    """A stage of the build failed, or a graph breaks the precision policy (exit 6)."""

    exit_code = 6


class VerificationError(LcexportError):
    """An engine's numbers left their thresholds (exit 7)."""

    exit_code = 7


class IntegrityError(LcexportError):
    """A bundle's file is missing or is not the file the manifest names (exit 8)."""

    exit_code = 8


class LockedError(LcexportError):
    """Another build holds the folder (exit 9)."""

    exit_code = 9


class RegressionError(LcexportError):
    """A measurement is worse than an earlier one by more than was allowed (exit 10)."""

    exit_code = 10


class Cancelled(LcexportError):
    """The caller's cancel token was set (exit 130)."""

    exit_code = 130
