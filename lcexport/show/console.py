"""The console, JSON, and tables that are readable in 80 columns.

No text is taken for markup: a path may hold `[b]` or `:cat:`.
"""

import json
import math
import sys
import textwrap
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 100  # where the output is no terminal
SCHEMA_VERSION = 1  # of every JSON document that does not carry one of its own
LABEL = 14  # characters before a fact

out = Console(
    soft_wrap=True,
    markup=False,
    emoji=False,
    highlight=False,
    width=None if sys.stdout.isatty() else PLAIN_WIDTH,
)


def show_json(document: Mapping[str, object]) -> None:
    """One JSON document on standard output. JSON has no NaN or infinity: they become null."""
    sys.stdout.write(json_text(document, indent=2) + "\n")


def show_line(document: Mapping[str, object]) -> None:
    """The same in one line, which is easier to find in a log."""
    sys.stdout.write(json_text(document, indent=None) + "\n")


def json_text(document: Mapping[str, object], indent: int | None) -> str:
    versioned = without_nan({"schema_version": SCHEMA_VERSION, **document})
    return json.dumps(versioned, indent=indent, default=str, allow_nan=False)


def without_nan(value: object) -> object:
    """The same document with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_text(text: str) -> None:
    """A line as it is."""
    out.print(text)


def show_fact(label: str, text: str) -> None:
    """`label   text`, wrapped between words with the text's own margin."""
    lines = textwrap.wrap(
        text, max(out.width - LABEL, 1), break_long_words=False, break_on_hyphens=False
    )
    out.print(label.ljust(LABEL) + ("\n" + " " * LABEL).join(lines))


def table(title: str, *columns: str) -> Table:
    """A table; columns of numbers are named `>name` and stand to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        side = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, overflow="fold")
    return made


def listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def amount(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
