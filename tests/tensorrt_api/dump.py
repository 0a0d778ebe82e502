"""Write what an importable TensorRT module offers: `python dump.py tensorrt_rtx OUTPUT.json.xz`.

Names and signatures only. For bindings without their native libraries, see `bindings_shim.py`.
"""

import importlib
import inspect
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

MODULE = re.compile(r"(\d+\. )?\w+\(")


def signatures(thing: Any) -> list[str]:
    """The lines of a pybind11 docstring that are signatures."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    return [line for line in lines if MODULE.match(line) and ("->" in line or "*args" in line)]


def class_surface(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bases": [base.__name__ for base in cls.__bases__],
        "init": signatures(cls.__init__),
        "methods": {},
        "properties": {},
    }
    for name in dir(cls):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property) or hasattr(value, "fget"):
            getter = (inspect.getdoc(value.fget) or "").splitlines()
            settable = value.fset is not None
            found["properties"][name] = {"get": next(iter(getter), None), "settable": settable}
        elif callable(value):
            found["methods"][name] = signatures(getattr(cls, name))
    return found


def surface_of(module: Any) -> dict[str, Any]:
    """Classes, enumerations and functions of a module."""
    found: dict[str, Any] = {"version": module.__version__}
    found |= {"classes": {}, "enums": {}, "functions": {}}

    def add(name: str, value: Any) -> None:
        if isinstance(value, type):
            members = getattr(value, "__members__", None)
            if members is not None:
                found["enums"][name] = {key: int(member) for key, member in members.items()}
                return
            found["classes"][name] = class_surface(value)
            for inner, part in vars(value).items():
                if isinstance(part, type) and hasattr(part, "__members__"):
                    add(f"{name}.{inner}", part)
        elif callable(value):
            lines = (inspect.getdoc(value) or "").splitlines()
            found["functions"][name] = lines[0] if lines else ""

    for name in sorted(vars(module)):
        if not name.startswith("_"):
            add(name, getattr(module, name))
    return found


if __name__ == "__main__":
    text = json.dumps(surface_of(importlib.import_module(sys.argv[1])), indent=1, sort_keys=True)
    Path(sys.argv[2]).write_bytes(lzma.compress(text.encode()))
