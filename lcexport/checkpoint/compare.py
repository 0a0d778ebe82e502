"""Prove that a written checkpoint is its source: every native tensor, byte for byte."""

import numpy as np

from lcexport.checkpoint.layout import Checkpoint
from lcexport.checkpoint.reading import Chunk, read_chunks
from lcexport.checkpoint.scan import Progress
from lcexport.checkpoint.stream import converted
from lcexport.checkpoint.targets import Bulk, Islands, Target, native_targets
from lcexport.configs.errors import VerificationError


def check_same(
    source: Checkpoint,
    written: Checkpoint,
    *,
    bulk: Bulk = "keep",
    islands: Islands = "checkpoint",
    on_progress: Progress | None = None,
) -> int:
    """Compare every native tensor of `written` with the source's, cast as `bulk` and `islands` say.

    Both are read again from disk, whatever their naming and sharding. Returns the tensors compared.

    Raises:
        VerificationError: a tensor differs (the message names it), or the configurations do.
    """
    if source.config != written.config:
        raise VerificationError(
            f"{written.dit_folder} has another configuration than {source.dit_folder}",
            got=written.config, wanted=source.config,
        )  # fmt: skip
    targets = native_targets(source, bulk=bulk, islands=islands)
    pieces = written.native()
    if len(pieces) != len(targets):
        raise VerificationError("tensors are missing", got=len(pieces), wanted=len(targets))
    for target in targets:
        if pieces[target.name].dtype != target.dtype:
            raise VerificationError(
                f"tensor {target.name!r} was written in another dtype",
                got=pieces[target.name].dtype, wanted=target.dtype,
            )  # fmt: skip
    _check_bytes(targets, written, on_progress)
    return len(targets)


def _check_bytes(targets: list[Target], written: Checkpoint, on_progress: Progress | None) -> None:
    pieces = written.native()
    total = sum(piece.end - piece.start for target in targets for piece in target.ranges)
    done = 0
    sides = zip(
        read_chunks(target.ranges[0] for target in targets),
        read_chunks(pieces[target.name] for target in targets),
        strict=True,
    )
    for wanted, got in sides:
        _check_chunk(wanted, got, targets[wanted.piece], written)
        done += len(wanted.data)
        if on_progress:
            on_progress(done, total)


def _check_chunk(wanted: Chunk, got: Chunk, target: Target, written: Checkpoint) -> None:
    wanted_bytes, got_bytes = (
        np.frombuffer(d, np.uint8) for d in (converted(wanted, target), got.data)
    )
    if not np.array_equal(wanted_bytes, got_bytes):
        raise VerificationError(
            f"tensor {target.name!r} in {written.dit_folder} is not what the source holds",
            do="Convert again; if it happens twice, suspect the disk or the memory.",
        )
