"""What a release of TensorRT's Python API offers, from a dump or from the module itself."""

import json
import lzma
import re
from functools import cache
from pathlib import Path
from typing import Any

RELEASES = ("10.14.1.48.post1", "10.16.1.11", "11.4.0.106", "rtx-1.7.1.116")
ALIASES = {"float32", "float16", "bfloat16", "int32", "int64", "int8", "uint8", "bool"}
CPP_NAMES = {"nvonnxparser::IParserError": "ParserError"}
PARAMETER = re.compile(r"(\w+): ((?:[^,<]|<[^>]*>|,(?! \w+:))*)")


class Surface:
    """One release: classes, enumerations, functions."""

    def __init__(self, release: str, data: dict[str, Any]) -> None:
        self.release = release
        self.classes: dict[str, Any] = data["classes"]
        self.enums: dict[str, dict[str, int]] = data["enums"]
        self.functions: dict[str, Any] = data["functions"]

    def member(self, owner: str, name: str) -> str | None:
        """What `owner.name` is: "method", "property", "enum", "value"; None where there is none."""
        if name in self.enums.get(owner, {}) or (owner in self.enums and name == "__members__"):
            return "value"
        if f"{owner}.{name}" in self.enums:
            return "enum"
        found = self.classes.get(owner, {})
        if name in found.get("methods", {}):
            return "method"
        if name in found.get("properties", {}):
            return "property"
        if name == "__init__" and owner in self.classes:
            return "method"
        for base in found.get("bases", []):
            if base in self.classes and (kind := self.member(base, name)):
                return kind
        return None

    def top(self, name: str) -> str | None:
        """What the module's `name` is."""
        if name in self.enums:
            return "enum"
        if name in self.classes:
            return "class"
        return "function" if name in self.functions or name in ALIASES | {"__version__"} else None

    def settable(self, owner: str, name: str) -> bool:
        found = self.classes.get(owner, {})
        if name in found.get("properties", {}):
            return found["properties"][name]["settable"]
        return any(self.settable(base, name) for base in found.get("bases", []))

    def lines(self, owner: str, name: str) -> list[str]:
        """Signature lines of a method, or of the constructor where `name` is "__init__"."""
        found = self.classes.get(owner, {})
        own = found.get("init", []) if name == "__init__" else found.get("methods", {}).get(name)
        if own:
            return [line for line in own if "*args" not in line]
        for base in found.get("bases", []):
            if base in self.classes and (lines := self.lines(base, name)):
                return lines
        return []

    def overloads(self, owner: str, name: str) -> list[tuple[tuple[str, bool], ...]]:
        """Each overload's parameters after `self`: the name, and whether it has a default."""
        return [parameters(line) for line in self.lines(owner, name)]

    def returns(self, owner: str, name: str) -> str | None:
        """The class that a method returns, or that a property is; None for other types."""
        found = self.classes.get(owner, {})
        lines = self.lines(owner, name)
        if name in found.get("properties", {}):
            lines = [found["properties"][name]["get"] or ""]
        kinds = {line.rpartition("-> ")[2].rpartition(".")[2] for line in lines}
        kinds = {CPP_NAMES.get(kind, kind.rpartition("::")[2]) for kind in kinds}
        return next((kind for kind in kinds if kind in self.classes), None)


def parameters(line: str) -> tuple[tuple[str, bool], ...]:
    """The parameters of a pybind11 signature line, without `self`."""
    inside = line[line.index("(") + 1 : line.rindex(")")]
    found = [(name, " = " in kind) for name, kind in PARAMETER.findall(inside)]
    return tuple((name, default) for name, default in found if name not in ("self", "arg0"))


@cache
def surface(release: str) -> Surface:
    """One of `RELEASES`, from its dump."""
    path = Path(__file__).parent / f"api-{release}.json.xz"
    return Surface(release, json.loads(lzma.decompress(path.read_bytes())))
