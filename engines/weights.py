"""The bundle's weights on a device, for engines that are handed them."""

import json
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcexport.configs.errors import IntegrityError
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import WEIGHTS, EngineRecord

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.12 on
LENGTH_BYTES = 8  # of the header, in front of it
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
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            entries = json.loads(file.read(min(length, path.stat().st_size)))
            flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            data = mmap.mmap(file.fileno(), 0, flags, access)
        entries.pop("__metadata__", None)
        return {
            name: torch.frombuffer(
                data,
                dtype=TORCH_DTYPES[entry["dtype"]],
                count=torch.Size(entry["shape"]).numel(),
                offset=LENGTH_BYTES + length + entry["data_offsets"][0],
            ).view(entry["shape"])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            f"{path} is not a file of weights", got=error, do="Copy the bundle again."
        ) from error
