"""From a plan file to a deserialised engine, trusting nothing on the way.

A plan is executable code. Three questions come before TensorRT sees a byte of it: was it built
for what is here (`check_target`), is it the file that the manifest names (`VerifiedPlan`), and
are the bytes handed over those that were hashed (each chunk is checked again as it is read).
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import torch

from lcexport.configs.errors import IncompatibleError, IntegrityError
from lcexport.engines.trt.memory import driver_version, missing_gpu
from lcexport.engines.trt.options import AMPERE, HardwareCompatibility
from lcexport.engines.trt.product import MessageLog, Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

CHUNK_BYTES = 64 << 20  # of the file held in host memory while an engine is read


@dataclass(frozen=True)
class PlanFile:
    """A plan, and what the manifest says of it."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BuiltFor:
    """What a plan was built with and for, as the manifest records it.

    `compute_capabilities` holds "sm90" for the GPU it was built on, or the targets that were
    asked for, or nothing where the product chose them. `gpu` and `driver` (its CUDA version,
    "13.0") are None for a plan built without a GPU. The last two are the build's options.
    """

    product: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None = None
    driver: str | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False


@dataclass(frozen=True)
class Here:
    """What there is to run a plan on."""

    product: str
    version: str
    platform: str
    compute_capability: str
    gpu: str
    driver: str | None


def read_here(product: Product, device: torch.device) -> Here:
    """Ask torch and the driver. IncompatibleError: torch sees no such GPU."""
    if missing := missing_gpu():
        raise IncompatibleError(
            f"{product.name} engines run on NVIDIA GPUs, and torch sees none",
            got=missing,
            do="Install an NVIDIA driver and a CUDA build of torch, or use another backend.",
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise IncompatibleError(
            "no such GPU", got=device, wanted=f"cuda:0 to cuda:{count - 1}, of {count}"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return Here(
        product.name,
        ".".join(map(str, product.version)),
        this_platform(),
        f"sm{major}{minor}",
        torch.cuda.get_device_name(device),
        driver_version(),
    )


def this_platform() -> str:
    """Operating system and processor: "linux-x86_64".

    NVIDIA says that RTX plans move between Windows and Linux; refusing that is our choice, as it
    has not been tried.
    """
    return f"{platform.system()}-{platform.machine()}".lower()


def check_target(built: BuiltFor, here: Here, rebuild: str) -> None:
    """Compare field by field, before any file is opened.

    Args:
        rebuild: the command that builds the plan for this machine.

    Raises:
        IncompatibleError: names every field that differs, with both values.
    """
    pairs = [
        ("product", built.product == here.product, built.product, here.product),
        ("version", version_fits(built, here), built.version, here.version),
        ("platform", built.platform == here.platform, built.platform, here.platform),
        (
            "compute capability",
            capability_fits(built, here),
            " or ".join(built.compute_capabilities),
            here.compute_capability,
        ),
        ("GPU", gpu_fits(built, here), built.gpu, here.gpu),
        ("driver", driver_fits(built, here), built.driver, here.driver),
    ]
    refuse_differences(pairs, rebuild)


def refuse_differences(pairs: Sequence[tuple[str, bool, object, object]], rebuild: str) -> None:
    """IncompatibleError that names every (field, fits, built for, found) which does not fit."""
    wrong = [(field, was, found) for field, fits, was, found in pairs if not fits]
    if wrong:
        raise IncompatibleError(
            f"the plan was built elsewhere: another {', '.join(field for field, _, _ in wrong)}",
            got="; ".join(f"{field} {found}" for field, _, found in wrong),
            wanted="; ".join(f"{field} {was}" for field, was, _ in wrong),
            do=f"Rebuild it here: {rebuild}",
        )


def version_fits(built: BuiltFor, here: Here) -> bool:
    if built.version_compatible:
        return numbers(here.version) >= numbers(built.version)
    return built.version == here.version


def capability_fits(built: BuiltFor, here: Here) -> bool:
    if built.hardware_compatibility == "ampere_plus":
        return int(here.compute_capability.removeprefix("sm")) >= AMPERE
    return not built.compute_capabilities or here.compute_capability in built.compute_capabilities


def gpu_fits(built: BuiltFor, here: Here) -> bool:
    return built.gpu is None or built.hardware_compatibility != "none" or built.gpu == here.gpu


def driver_fits(built: BuiltFor, here: Here) -> bool:
    """Our rule, after CUDA's promise that a newer driver runs what an older one ran; not tried."""
    if built.driver is None:
        return True
    return here.driver is not None and numbers(here.driver) >= numbers(built.driver)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


class VerifiedPlan:
    """A plan file whose every byte is checked against the manifest before it is handed out.

    Opening reads the whole file once. The digest of each chunk is kept, and a chunk read again
    must still have it: a file changed in between is noticed, and only one chunk is in memory.

    Raises:
        IntegrityError: missing, cut short, too long, or other content.
    """

    def __init__(self, plan: PlanFile, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.plan, self._chunk_bytes = plan, chunk_bytes
        self._held: tuple[int, bytes] = (-1, b"")
        self._digests: list[bytes] = []
        try:
            self._file: BinaryIO = plan.path.open("rb")
        except FileNotFoundError as error:
            raise IntegrityError(f"{plan.path} is missing", do="Rebuild the bundle.") from error
        try:
            self._hash()
        except BaseException:
            self.close()
            raise

    def _hash(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != self.plan.bytes:
            raise self._differs("size", f"{size} bytes", f"{self.plan.bytes} bytes")
        whole = hashlib.sha256()
        while chunk := self._file.read(self._chunk_bytes):
            whole.update(chunk)
            self._digests.append(hashlib.sha256(chunk).digest())
        if whole.hexdigest() != self.plan.sha256:
            raise self._differs("SHA-256", whole.hexdigest(), self.plan.sha256)

    def _differs(self, what: str, got: str, wanted: str) -> IntegrityError:
        return IntegrityError(
            f"{self.plan.path} is not the plan that the manifest names: another {what}",
            got=got,
            wanted=wanted,
            do="Do not load it: a plan is executable code. Copy the bundle again, or rebuild it.",
        )

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `offset`: fewer at the end of a chunk, none at the end."""
        index, start = divmod(offset, self._chunk_bytes)
        chunk = self._chunk(index)
        if start == 0 and nbytes >= len(chunk):
            return chunk
        return chunk[start : start + nbytes]

    def copy_to(self, file: BinaryIO) -> None:
        """Write all of it to another file, for what is loaded from a path."""
        for index in range(len(self._digests)):
            file.write(self._chunk(index))

    def _chunk(self, index: int) -> bytes:
        if index >= len(self._digests):
            return b""
        if self._held[0] != index:
            self._held = (-1, b"")
            self._file.seek(index * self._chunk_bytes)
            chunk = self._file.read(self._chunk_bytes)
            if hashlib.sha256(chunk).digest() != self._digests[index]:
                raise self._differs("content", "bytes that changed while it was read", "the same")
            self._held = (index, chunk)
        return self._held[1]

    def close(self) -> None:
        """Close the file and drop the chunk in memory."""
        self._held = (-1, b"")
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def deserialize(
    product: Product, runtime: TensorRT.Runtime, plan: VerifiedPlan, log: MessageLog
) -> TensorRT.ICudaEngine:
    """The `ICudaEngine` in a plan.

    Raises:
        IntegrityError: the file changed while it was read.
        IncompatibleError: TensorRT refused it, or there is no driver.
    """
    try:
        reader, failure = stream_reader(product, plan)
    except RuntimeError as error:  # the reader's base class opens the CUDA driver
        raise IncompatibleError(
            "TensorRT cannot open the CUDA driver", got=error, do="Install an NVIDIA driver."
        ) from error
    engine = runtime.deserialize_cuda_engine(reader)
    if (error := failure()) is not None:
        raise error
    return refused_if_none(engine, plan, log)


def refused_if_none(
    engine: TensorRT.ICudaEngine | None, plan: VerifiedPlan, log: MessageLog
) -> TensorRT.ICudaEngine:
    if engine is None:
        raise IncompatibleError(
            f"TensorRT refused {plan.plan.path}",
            got=said(log, "deserialize_cuda_engine returned None"),
            do="Rebuild the engine with this version of TensorRT, or free device memory.",
        )
    return engine


def said(log: MessageLog, call: str) -> str:
    """What a call returned, and the latest error that TensorRT logged."""
    return f"{call} ({log.errors[-1].strip()})" if log.errors else call


def stream_reader(
    product: Product, plan: VerifiedPlan
) -> tuple[Any, Callable[[], BaseException | None]]:
    """A reader of `plan` for TensorRT, and a function that says what went wrong in it.

    TensorRT swallows what its callbacks raise, so the reader keeps it and ends the stream.
    """
    trt = product.trt

    class Reader(trt.IStreamReaderV2):
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)
            self.position = 0
            self.failure: BaseException | None = None

        # The binding's own signature is its C++ side's: it calls this one and copies the result.
        def read(self, num_bytes: int, stream: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
            try:
                data = plan.read(self.position, num_bytes)
            except BaseException as error:
                self.failure = error
                return b""
            self.position += len(data)
            return data

        def seek(self, offset: int, where: TensorRT.SeekPosition) -> bool:
            origins = {
                trt.SeekPosition.SET: 0,
                trt.SeekPosition.CUR: self.position,
                trt.SeekPosition.END: plan.plan.bytes,
            }
            target = origins[where] + offset
            if not 0 <= target <= plan.plan.bytes:
                return False
            self.position = target
            return True

    reader = Reader()
    return reader, lambda: reader.failure
