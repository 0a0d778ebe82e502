"""Check that a wheel holds the whole package and nothing else.

    python tools/inspect_wheel.py dist/lcexport-*.whl

Every python, TOML, C++ and py.typed file of the packages in the tree must be in the wheel, byte for
byte, and the trained toy, and nothing beside them but the wheel's own metadata. Exit code 1 names
what is wrong.
"""

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHIPPED = ("*.py", "*.toml", "*.h", "py.typed")
TOY = ROOT / "lcexport" / "toy"


def main(wheel: Path) -> int:
    """Print what the wheel lacks or holds too much, or one line that says it is whole."""
    expected = files_of_packages()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        differing = [n for n in expected if n in names and archive.read(n) != expected[n]]
    wrong = [f"missing: {name}" for name in sorted(set(expected) - names)]
    wrong += [f"unexpected: {name}" for name in sorted(names - set(expected))]
    wrong += [f"differs from the tree: {name}" for name in sorted(differing)]
    for line in wrong:
        print(f"{wheel.name}: {line}")
    if not wrong:
        packages = {name.rpartition("/")[0] for name in names}
        print(f"{wheel.name}: {len(names)} files in {len(packages)} packages, as in the tree")
    return 1 if wrong else 0


def files_of_packages() -> dict[str, bytes]:
    """Path in the wheel -> content. The links in lcexport/ are followed: a wheel has no links."""
    # os.walk, because Path.rglob stops at links to folders.
    walked = os.walk(ROOT / "lcexport", followlinks=True)
    folders = [Path(folder) for folder, _, _ in walked]
    found = {path for folder in folders for shipped in SHIPPED for path in folder.glob(shipped)}
    found |= {path for path in TOY.rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(found)}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
