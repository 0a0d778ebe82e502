"""The application object, and what several commands share: options, progress, small parsing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lcexport.configs.errors import UsageError

app = typer.Typer(
    name="lcexport",
    help="LongCat-Video checkpoints in, verified engines out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
IslandsOption = Annotated[
    str,
    typer.Option(
        help="Weights of the fp32 parts: `checkpoint` as released, `original` rounded to bf16."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]


def names(text: str | None) -> tuple[str, ...] | None:
    """A list separated by commas."""
    return tuple(part.strip() for part in text.split(",")) if text else None


def pairs(words: Iterable[str]) -> dict[str, str]:
    """`name=value` words, each name once."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals) or name in found:
            raise UsageError("not a name and its value", got=repr(word), wanted="name=value, once")
        found[name] = value
    return found


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that draws on standard error, with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    what = TextColumn("{task.description}", markup=False)
    columns = (what, BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield bar
