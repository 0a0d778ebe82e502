"""The demo's big sibling: a checkpoint with random weights, and bundles of it to measure."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lcexport.bench.subject import COMPILE
from lcexport.builder import build, options_from
from lcexport.configs.errors import UsageError
from lcexport.demo import make_demo_checkpoint
from lcexport.engines import COMPILED, require_backend

SIZE = "bench"  # the checkpoint's, and the preset's


@contextmanager
def example_bundles(
    backends: Sequence[str], device: str, batches: Sequence[int] = (1,), resolution: str = SIZE
) -> Iterator[list[Path]]:
    """Bundles of the example, one for each batch, in a folder that is removed at the end.

    Raises:
        UsageError, IncompatibleError: a backend that this machine cannot build or run.
    """
    for backend in backends:
        if backend != COMPILE:
            require_backend(backend, "fp32", device)
    plans = [backend for backend in backends if backend in COMPILED]
    with TemporaryDirectory(prefix="lcexport-bench-") as temporary:
        folder = Path(temporary)
        make_demo_checkpoint(folder / "checkpoint", SIZE)
        bundles = [folder / f"batch{batch}" for batch in batches]
        for bundle, batch in zip(bundles, batches, strict=True):
            options = options_from(
                model=folder / "checkpoint",
                res=resolution,
                output=bundle,
                backends=",".join(plans) or "onnxruntime",
                batch=batch,
                device=device,
                only="compile" if plans else "export",
            )
            build(options)
        yield bundles


def batches_from(text: str) -> list[int]:
    """Batches separated by commas, each once; UsageError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,2}", word) for word in words) or len(set(words)) != len(words):
        raise UsageError("not a list of batches", got=repr(text), wanted="such as 1,2")
    return [int(word) for word in words]
