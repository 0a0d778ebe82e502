"""Stubs for type-checking `engines/trt`: the real bindings of TensorRT for RTX, as a class.

    python tools/make_trt_stubs.py     # writes .typings/tensorrt_api.pyi

The product's module is handed about as a value (`product.trt`), so its type must be a class:
`TensorRT`, with the module's classes as members. They are generated from the bindings that are
installed, by pybind11-stubgen, and never committed: their texts are NVIDIA's. What the enterprise
products lack of it, or have besides, tests/tensorrt_api checks name by name.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODULE = "tensorrt_rtx_bindings.tensorrt_rtx"
OUTPUT = Path(__file__).parents[1] / ".typings" / "tensorrt_api.pyi"
DOCSTRING = re.compile(r'\n *(?:r|u)?"""(?:.|\n)*?"""')
# `bool: DataType` and the like would hide Python's own types from the lines above them.
ALIAS_OF_A_TYPE = re.compile(r"^(?:bool|u?int\d+|b?float\d+|fp\d|e8m0): .*\n", re.MULTILINE)
# What the bindings can do without saying so: old-style iteration, and the buffer protocol.
UNSAID = {
    "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}
HEADING = '''
class TensorRT:
    """The module: its classes as members."""
    __version__: str
'''


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", MODULE, "-o", folder, "--ignore-all-errors"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        text = Path(folder, *MODULE.split(".")).with_suffix(".pyi").read_text("utf-8")
    text = ALIAS_OF_A_TYPE.sub("", with_bodies(DOCSTRING.sub("", text)))
    # What a callback is given is an int; one argument's name is a keyword of Python's.
    text = text.replace("typing.SupportsInt", "int").replace(" in: ", " in_: ")
    for name, method in UNSAID.items():
        head = re.compile(rf"^class {name}\b.*:\n", re.MULTILINE)
        assert head.search(text), f"there is no class {name}"
        text = head.sub(lambda found, added=method: f"{found.group()}    {added}\n", text)
    classes = re.findall(r"^class (\w+)", text, re.MULTILINE)
    members = "".join(f"    {name}: typing_extensions.TypeAlias = {name}\n" for name in classes)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(text + HEADING + members, "utf-8")
    print(f"{OUTPUT.name}: {len(classes)} classes of {MODULE}")


def with_bodies(text: str) -> str:
    """Put `...` into every class and function that held nothing but its docstring."""
    lines = text.splitlines()
    bodies = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        bodies.append(line)
        depth = len(line) - len(line.lstrip())
        if line.rstrip().endswith(":") and len(after) - len(after.lstrip()) <= depth:
            bodies.append(" " * (depth + 4) + "...")
    return "\n".join(bodies) + "\n"


if __name__ == "__main__":
    main()
