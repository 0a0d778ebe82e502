"""What a qualification found."""

from pathlib import Path

from rich.text import Text

from lcexport.qualify.run import Qualification
from lcexport.show.console import out, show_text, table

STYLES = {"proven": "green", "refuted": "red", "measured": "cyan", "not tested": "yellow"}


def show_qualification(found: Qualification, folder: Path) -> None:
    """Every claim's verdict, and where the whole report is."""
    rows = table(f"{found.subject['backend']} {found.subject['resolution']}", "claim", "", "why")
    for result in found.results:
        rows.add_row(result.claim.id, Text(result.verdict, STYLES[result.verdict]), result.why)
    out.print(rows)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found.counts().items())
    show_text(f"{counts}; see {folder}")
