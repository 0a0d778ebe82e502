"""Write a checkpoint's weights as one safetensors file, in one pass and in bounded memory.

The file is written front to back, so that its digest, and the digest of every source tensor, come
out on the way. Threads read ahead, digest what was read, write, and digest what is written, while
this one checks and rounds.
Data starts at a multiple of 4096 bytes and every tensor whose size is a multiple of 256 bytes
starts at one: such a file can be mapped and handed to a GPU runtime as it is.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import torch

from lcexport.checkpoint.int8 import dequantise, quantise
from lcexport.checkpoint.layout import Checkpoint, Piece, whole
from lcexport.checkpoint.reading import TORCH_DTYPES, Chunk, one_thread, read_chunks, read_scale
from lcexport.checkpoint.scan import (
    Progress,
    SourceDigests,
    check_finite,
    check_scales,
    is_finite,
)
from lcexport.checkpoint.targets import (
    Bulk,
    Islands,
    Target,
    native_targets,
    original_targets,
)
from lcexport.configs.errors import InputError, ResourceError, UsageError
from lcexport.engines.files import new_file
from lcexport.engines.header import LENGTH_BYTES, TensorInfo
from lcexport.engines.manifest import WeightsDtype

PAGE_BYTES = 4096
WAITING = 4  # chunks between the arithmetic and the disk: some 30 MB


class Deltas(Protocol):
    """What is added to native tensors while they are written, before the one rounding."""

    def __contains__(self, name: object) -> bool: ...

    def added(self, name: str, first: int, values: torch.Tensor) -> torch.Tensor:
        """Flat FP32 `values`, the tensor's elements from `first` on, with what is added to them."""
        ...


@dataclass(frozen=True)
class WriteReport:
    """A written file: its size and SHA-256, its tensors, and the digests of the source's.

    `tensors_sha256` sums up the source: one line per source tensor with name, dtype, shape and
    SHA-256 (`source_digests`), sorted by name. It does not depend on how the source is sharded.
    """

    path: Path
    bytes: int
    sha256: str
    tensors_sha256: str
    count: int
    tensors: dict[str, TensorInfo]
    source_digests: dict[str, str]

    def moved(self, path: Path) -> "WriteReport":
        """The same report for the file under another name."""
        tensors = {name: replace(info, path=path) for name, info in self.tensors.items()}
        return replace(self, path=path, tensors=tensors)


def write_native(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    bulk: Bulk,
    islands: Islands = "checkpoint",
    weights: WeightsDtype = "bulk",
    scan: bool = True,
    deltas: Deltas | None = None,
    on_progress: Progress | None = None,
) -> WriteReport:
    """Write the weights under native names.

    Args:
        checkpoint: the source, of either naming.
        path: the new file.
        bulk: "keep" copies all bytes as they are; "bf16" rounds the bulk and writes the FP32
            islands as F32; "fp32" writes everything as F32; "int8" quantises every Linear but the
            last, rounds their biases to BF16 and keeps the rest, as LongCat's own code does.
        islands: beside a BF16 bulk, "checkpoint" keeps the islands' values and "original" rounds
            them to BF16 before widening, which is what the original computes with.
        weights: "int8" quantises the bulk's Linears beside a bulk of "bf16" or "fp32"; integers
            that the source has already are kept.
        scan: refuse NaN, infinities and values that overflow in the cast.
        deltas: added to the values, of islands as `islands` says, in FP32.
        on_progress: called with source bytes done and in total; it may raise to stop.

    Raises:
        InputError: the checkpoint is incomplete, unreadable, or fails the scan.
        ResourceError: the file exists, or the disk is full.
        UsageError: `bulk`, `islands` and `weights` contradict each other.
    """
    if deltas is not None and weights == "int8":
        raise UsageError(
            "LoRAs cannot be added to int8 weights",
            do="Add them with --weights-dtype bulk; int8 rounds each row to 255 levels.",
        )
    targets = native_targets(checkpoint, bulk=bulk, islands=islands, weights=weights)
    metadata = _metadata(bulk, islands)
    return _write(checkpoint, targets, Path(path), metadata, scan, on_progress, deltas)


def write_original(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    bulk: Bulk,
    islands: Islands = "checkpoint",
    scan: bool = True,
    on_progress: Progress | None = None,
) -> WriteReport:
    """Write the weights under original names, q/k/v joined; otherwise like `write_native`."""
    targets = original_targets(checkpoint, bulk=bulk, islands=islands)
    return _write(checkpoint, targets, Path(path), _metadata(bulk, islands), scan, on_progress)


def _metadata(bulk: Bulk, islands: Islands) -> dict[str, str]:
    return {"format": "pt", "precision": bulk, "islands": islands}


def _write(
    checkpoint: Checkpoint,
    targets: list[Target],
    path: Path,
    metadata: dict[str, str],
    scan: bool,
    on_progress: Progress | None,
    deltas: Deltas | None = None,
) -> WriteReport:
    check_scales(checkpoint.tensors.values())
    header, tensors = _layout(targets, path, metadata)
    size = len(header) + sum(target.bytes for target in targets)
    _check_space(path, size)
    with one_thread(), new_file(path, large=True) as file, _Writer(file) as writer:
        writer.put(header)
        digests = SourceDigests()
        total = sum(piece.end - piece.start for target in targets for piece in target.ranges)
        done = 0
        for _, data, read in contents(targets, digests=digests, scan=scan, deltas=deltas):
            writer.put(data)
            done += read
            if on_progress:
                on_progress(done, total)
        writer.finish()
        # what the integers were multiplied with is of the source as well
        scales = {p.scale.source.name: p.scale for t in targets for p in t.ranges if p.scale}
        for chunk in read_chunks(whole(scale.source) for scale in scales.values()):
            digests.add(chunk)
        assert file.tell() == size, "the file is not as long as its header says"
    return WriteReport(
        path, size, writer.digest.hexdigest(), digests.combined(), len(tensors), tensors,
        digests.digests,
    )  # fmt: skip


def contents(
    targets: list[Target],
    *,
    digests: SourceDigests | None = None,
    scan: bool = False,
    deltas: Deltas | None = None,
) -> Iterator[tuple[Target, memoryview, int]]:
    """The targets' bytes in order, in memory of their own, each with the source bytes it took.

    Args:
        digests: takes the bytes of the source tensors.
        scan: refuse NaN, infinities and values that overflow in the cast.
        deltas: what is added to the values.
    """
    chunks = read_chunks((p for target in targets for p in target.ranges), whole_rows=True)
    if digests:
        chunks = _digested(chunks, digests)
    found: dict[str, list[torch.Tensor]] = {}  # the scales of what was quantised on the way
    for target in targets:
        if not target.ranges:
            yield target, _raw(torch.cat(found.pop(target.name))), 0
        first = 0
        for piece in target.ranges:
            scale = None if piece.scale is None else read_scale(piece.scale)
            for chunk in _until_last(chunks):
                values = _values(chunk, piece, scale)
                if scan:
                    check_finite(values, chunk.source, target.narrowest)
                if deltas and target.name in deltas:
                    first, begin = first + values.numel(), first
                    values = merged(values, target, deltas, begin)
                elif target.is_quantised_here:
                    values, rows = quantise(values.view(-1, piece.shape[1]))
                    found.setdefault(target.scales, []).append(rows)
                else:
                    values = target.cast(values)
                yield target, _raw(values), len(chunk.data)


def _digested(chunks: Iterator[Chunk], digests: SourceDigests) -> Iterator[Chunk]:
    """The chunks, digested by a thread while they are in use."""
    with ThreadPoolExecutor(1, "digesting the source") as thread:
        for chunk in chunks:
            done = thread.submit(digests.add, chunk)
            yield chunk
            done.result()


def _until_last(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of one piece."""
    for chunk in chunks:
        yield chunk
        if chunk.last:
            return


def _values(chunk: Chunk, piece: Piece, scale: torch.Tensor | None) -> torch.Tensor:
    """The chunk's elements, flat; of a quantised piece the float32 ones it stands for."""
    if scale is None:
        return chunk.values()
    rows = chunk.values().view(-1, piece.shape[1])
    first = chunk.first // piece.shape[1]
    return dequantise(rows, scale[first : first + len(rows)]).view(-1)


def _raw(values: torch.Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data


class _Writer:
    """Sequential output and its digest, a thread for each: neither waits for the other's turn."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1, name) for name in ("writing", "digesting")]
        self._waiting: deque[list[Future[object]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def put(self, data: bytes | memoryview) -> None:
        """Hand over bytes that will not change any more; waits where the disk is far behind."""
        self.finish(leave=WAITING)
        works = zip(self._threads, (self.file.write, self.digest.update), strict=True)
        self._waiting.append([thread.submit(work, data) for thread, work in works])

    def finish(self, *, leave: int = 0) -> None:
        """Wait until at most `leave` writes are ahead; raises what a finished one raised."""
        while len(self._waiting) > leave:
            for future in self._waiting.popleft():
                future.result()


def merged(values: torch.Tensor, target: Target, deltas: Deltas, first: int) -> torch.Tensor:
    """A target's elements from `first` on, with what is added to them."""
    values = values.bfloat16().float() if target.through_bf16 else values.float()
    values = deltas.added(target.name, first, values).to(TORCH_DTYPES[target.dtype])
    if not is_finite(values):
        raise InputError(
            f"{target.name} does not fit {target.dtype} with what is added to it",
            do="Use a smaller strength.",
        )
    return values


def _layout(
    targets: list[Target], path: Path, metadata: dict[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's bytes, padded with spaces as the format allows, and the tensors' places."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for target in targets:
        offsets = [position, position + target.bytes]
        entries[target.name] = {
            "dtype": target.dtype, "shape": target.shape, "data_offsets": offsets
        }  # fmt: skip
        position += target.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % PAGE_BYTES)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    tensors, position = {}, len(header)
    for target in targets:
        end = position + target.bytes
        tensors[target.name] = TensorInfo(
            path, target.name, target.dtype, target.shape, position, end
        )
        position = end
    return header, tensors


def _check_space(path: Path, size: int) -> None:
    """Say that the disk is too small before half an hour of writing, not after."""
    if not path.parent.is_dir():
        raise ResourceError(f"the folder {path.parent} does not exist", do="Create it first.")
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ResourceError(
            f"the disk is too small for {path}", got=f"{free} bytes free", wanted=size,
            do="Free some space or choose another disk.",
        )  # fmt: skip
