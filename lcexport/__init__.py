"""lcexport: LongCat-Video checkpoints in, verified engines out.

Importing this package costs nothing: it pulls in neither torch nor the exporter.
"""

from importlib.metadata import version as _version


def __getattr__(name: str) -> str:
    if name == "__version__":
        return _version("lcexport")
    raise AttributeError(f"module 'lcexport' has no attribute {name!r}")
