"""Prove that a written checkpoint is its source: every native tensor, byte for byte."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lcexport.checkpoint.int8 import int8_names
from lcexport.checkpoint.layout import Checkpoint, Piece
from lcexport.checkpoint.reading import Chunk, one_thread, read_chunks
from lcexport.checkpoint.scan import Progress
from lcexport.checkpoint.stream import contents
from lcexport.checkpoint.targets import Bulk, Islands, Target, native_targets
from lcexport.configs.errors import VerificationError


@one_thread()
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
    pieces = stored_pieces(written)
    if len(pieces) != len(targets):
        raise VerificationError("tensors are missing", got=len(pieces), wanted=len(targets))
    for target in targets:
        found = pieces.get(target.name)
        if found is None or found.dtype != target.dtype:
            raise VerificationError(
                f"tensor {target.name!r} was written in another dtype",
                got=found.dtype if found else "none", wanted=target.dtype,
            )  # fmt: skip
    _check_bytes(targets, pieces, written, on_progress)
    return len(targets)


def stored_pieces(checkpoint: Checkpoint) -> dict[str, Piece]:
    """Every native tensor as its bytes lie in the files: integers and scales by themselves."""
    pieces = {}
    for name, piece in checkpoint.native().items():
        if piece.scale is None:
            pieces[name] = piece
        else:
            quantised, scale = int8_names(name)
            pieces |= {quantised: replace(piece, scale=None), scale: piece.scale}
    return pieces


def _check_bytes(
    targets: list[Target],
    pieces: dict[str, Piece],
    written: Checkpoint,
    on_progress: Progress | None,
) -> None:
    total = sum(piece.end - piece.start for target in targets for piece in target.ranges)
    done = 0
    chunks = read_chunks((pieces[target.name] for target in targets), whole_rows=True)
    for target, wanted, read in contents(targets):
        _check_block(wanted, chunks, target, written)
        done += read
        if on_progress:
            on_progress(done, total)


def _check_block(
    wanted: memoryview, chunks: Iterator[Chunk], target: Target, written: Checkpoint
) -> None:
    """The next chunks hold the same bytes: one chunk, or several where all scales come at once."""
    values, position = np.frombuffer(wanted, np.uint8), 0
    while position < len(values):
        got = np.frombuffer(next(chunks).data, np.uint8)
        if not np.array_equal(values[position : position + len(got)], got):
            raise VerificationError(
                f"tensor {target.name!r} in {written.dit_folder} is not what the source holds",
                do="Convert again; if it happens twice, suspect the disk or the memory.",
            )
        position += len(got)
