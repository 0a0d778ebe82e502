"""The report as a page of Markdown, made of the JSON's own document and of nothing else."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MOST_ROWS = 20  # of one claim; the JSON has all


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    subject, claims = document["subject"], document["claims"]
    title = f"# Qualification: {subject['backend']}, {subject['resolution']}"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in document["verdicts"].items())
    facts = {name: value for name, value in subject.items() if name != "engine"}
    sections = "\n\n".join(map(section, claims))
    return (
        f"{title}\n\n{len(claims)} claims: {counts}.\n\n{overview(claims)}\n\n"
        f"## The engine\n\n{table(('what', 'value'), rows_of(facts))}\n\n"
        f"## The machine\n\n{table(('what', 'value'), rows_of(document['environment']))}\n\n"
        f"{sections}\n"
    )


def overview(claims: Iterable[Mapping[str, Any]]) -> str:
    """Every claim and its verdict on a line."""
    rows = ((f"[{claim['claim']}](#{claim['id']})", claim["verdict"]) for claim in claims)
    return table(("claim", "verdict"), rows)


def section(claim: Mapping[str, Any]) -> str:
    """One claim: what is claimed, how it was tested, what was measured, and the verdict."""
    lines = [
        f"## {claim['id']}",
        f"**{claim['verdict'].capitalize()}.** {claim['claim']}",
        f"Tested: {claim['test']}",
    ]
    if claim["threshold"]:
        lines.append(f"Threshold: {claim['threshold']}")
    if claim["why"]:
        lines.append(f"Why: {claim['why']}")
    rows = list(rows_of(claim["measured"]))
    if rows:
        lines.append(table(("measured", "value"), rows[:MOST_ROWS]))
    if len(rows) > MOST_ROWS:
        lines.append(f"{len(rows) - MOST_ROWS} further figures are in the JSON.")
    return "\n\n".join(lines)


def rows_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A row for each measurement; a group of them is one. What fills lines stays in the JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{inner} {shown(v)}" for inner, v in value.items())
        elif not (isinstance(value, str) and "\n" in value):
            yield name, shown(value)


def table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """Two columns."""
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def shown(value: object) -> str:
    """A value for a cell: four digits of a fraction, thousands in groups, no bare pipes."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value).replace("|", "\\|").replace("\n", " ")
