"""lcexport: LongCat-Video checkpoints in, verified engines out.

Importing this package costs nothing: it pulls in neither torch nor the exporter.
"""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # a tenth of the time that --help takes

        return version("lcexport")
    raise AttributeError(f"module 'lcexport' has no attribute {name!r}")
