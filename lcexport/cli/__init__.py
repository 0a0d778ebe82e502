"""The command line: parse, call one function, show its result. No logic lives here.

One file for each family of commands, which importing it adds to `app`. Heavy libraries are imported
inside the command that needs them, so that --help is immediate.

Results go to standard output, progress and logs to standard error. Exit codes: docs/exit-codes.md.
"""

import logging
import sys
from typing import Any

import typer

from lcexport.cli import (  # noqa: F401
    bench,
    build,
    bundle,
    checkpoint,
    contact_sheet,
    environment,
    generate,
    long,
    lora,
    qualify,
    refine,
)
from lcexport.cli.app import app
from lcexport.configs.errors import LcexportError, ResourceError, UsageError

INTERRUPTED = 130
# The base of typer's own complaints about the command line. Not imported from click: recent
# versions of typer carry a click of their own.
COMMAND_LINE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def complaint(error: Any) -> str:
    """What is wrong with the command line, and in which option."""
    said = error.format_message() or "a command is missing"
    return " ".join(said.split()).rstrip(".")


def main() -> None:
    """The `lcexport` command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        # Not click's standalone mode: it would turn an interruption into exit code 1.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except LcexportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except COMMAND_LINE_ERROR as error:
        sys.stderr.write(f"error: {complaint(error)}. See `lcexport --help`.\n")
        sys.exit(UsageError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(
            "interrupted; an unfinished build continues with --resume, "
            "and `long` when the same command is run again\n"
        )
        sys.exit(INTERRUPTED)
    except OSError as error:  # a file that cannot be read, for one
        sys.stderr.write(f"error: {error}\n")
        sys.exit(ResourceError.exit_code)
