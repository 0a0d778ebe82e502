"""The bundle's weights on a device, for engines that are handed them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file

from lcexport.configs.errors import IntegrityError
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import WEIGHTS, EngineRecord


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
        weights = SharedWeights(load_file(bundle.path(WEIGHTS), device=str(device)), source)
    wanted = {
        call.prefix + tensor.name
        for call in record.calls
        for tensor in record.plans[call.plan].weights
    }
    if lacking := sorted(wanted - set(weights.tensors)):
        raise IntegrityError("the weights file lacks weights of the engine", got=lacking[:5])
    return weights
