"""The bundle's weights on a device, for engines that are handed them."""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcexport.configs.errors import InputError, IntegrityError
from lcexport.engines.bundle import Bundle
from lcexport.engines.header import read_header
from lcexport.engines.manifest import WEIGHTS, EngineRecord

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.12 on
ADVICE_BYTES = 1 << 20  # of one request to read: systems cut larger ones short
TORCH_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8
}  # fmt: skip


@dataclass(frozen=True)
class SharedWeights:
    """Tensors on the device by the names of the bundle's weights file, for plans without their own.

    `source` is that file's SHA-256: engines of one bundle use one set.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    source: str = ""


def shared_weights(
    bundle: Bundle, record: EngineRecord, device: torch.device, like: SharedWeights | None
) -> SharedWeights:
    """The bundle's weights on the device: `like` where it is the same file's.

    On a processor they are the file itself, mapped: nothing is read before it is used.

    Raises:
        IntegrityError: the file lacks what the engine takes.
    """
    source = bundle.manifest.files[WEIGHTS].sha256
    weights = like
    if weights is None or weights.source != source:
        mapped = map_weights(bundle.path(WEIGHTS))
        weights = SharedWeights({name: t.to(device) for name, t in mapped.items()}, source)
    wanted = {
        call.prefix + tensor.name
        for call in record.calls
        for tensor in record.plans[call.plan].weights
    }
    if lacking := sorted(wanted - set(weights.tensors)):
        raise IntegrityError("the weights file lacks weights of the engine", got=lacking[:5])
    return weights


def map_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file: the file itself, mapped; who writes to one has a copy.

    The library's own loader maps so too, but asks for memory to be set aside for such copies, which
    systems refuse for a file that is larger than the memory there is.

    Raises:
        IntegrityError: the file is not one of weights.
    """
    try:
        header = read_header(path)
        flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, flags, access)
        return {
            name: torch.frombuffer(
                data, dtype=TORCH_DTYPES[info.dtype], count=info.count, offset=info.start
            ).view(info.shape)
            for name, info in header.tensors.items()
        }
    except (InputError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{path} is not a file of weights", got=error, do="Copy the bundle again."
        ) from error


def will_need(weights: Iterable[torch.Tensor]) -> None:
    """Have the system read mapped tensors before they are touched, many requests at a time.

    Without it a pass over weights that are not in memory waits for page after
    page. It is advice: of tensors that are no mapped file nothing is read, and nothing fails.
    """
    advise = ctypes.CDLL(None).madvise  # Python's own wants the mapping, and not its tensors
    for weight in weights:
        end = weight.data_ptr() + weight.nbytes
        for start in range(weight.data_ptr() & -mmap.PAGESIZE, end, ADVICE_BYTES):
            size = min(ADVICE_BYTES, end - start)
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)
