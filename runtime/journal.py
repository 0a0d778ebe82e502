"""What a folder of segments is of, and which of them are finished: `journal.json`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines.files import write_bytes
from lcexport.engines.manifest import FileRecord

SCHEMA_VERSION = 1
JOURNAL = "journal.json"


class Segment(BaseModel):
    """One finished segment: its file, and which of the file's frames the video shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^\d{3,}\.safetensors$")
    record: FileRecord
    skipped: int = Field(ge=0)  # at the file's beginning: they are the segment before
    frames: int = Field(ge=1)  # shown, after those


class Journal(BaseModel):
    """What a folder's segments are. `request` is all that decides their frames."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    fps: float = Field(gt=0)
    height: int
    width: int
    request: dict[str, Any]
    segments: tuple[Segment, ...] = ()


Kept = Callable[[Journal], int | None]  # see `open_segments`


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UsageError that names what differs between two requests."""
    names = sorted(found.keys() | wanted.keys())
    other = [name for name in names if found.get(name) != wanted.get(name)]
    if other:
        shown = other[0]
        raise UsageError(
            f"{folder} holds another request's segments: {', '.join(other)} differ",
            got=f"{shown} {brief(wanted.get(shown))}", wanted=f"{brief(found.get(shown))} as there",
            do="Ask for the same to continue, or name another folder.",
        )  # fmt: skip


def brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_journal(folder: Path, journal: Journal) -> None:
    text = journal.model_dump_json(indent=1) + "\n"
    write_bytes(folder / JOURNAL, text.encode(), replace=True)


def read_journal(path: Path) -> Journal:
    """Parse `journal.json`. Raises IntegrityError, IncompatibleError: see `open_segments`."""
    do = "Move the folder away and start again."
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", do=do) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise IncompatibleError(
            f"{path} has another schema version", got=version, wanted=SCHEMA_VERSION, do=do
        )
    try:
        return Journal.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: {where}: {first['msg']}", do=do) from error
