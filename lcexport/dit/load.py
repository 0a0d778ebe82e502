"""From a checkpoint folder to a module that computes with its weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcexport.checkpoint import check_tensors, dequantised, is_island, open_checkpoint, read_tensor
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.dit.model import LongCatDiT

BULK_TENSOR = "patch_embed.proj.weight"  # is of the bulk, and never int8
BULK_DTYPES = (torch.float32, torch.bfloat16)


def load_dit(
    folder: str | Path, dtype: torch.dtype = torch.float32, *, islands: str = "checkpoint"
) -> LongCatDiT:
    """Load the DiT of a checkpoint folder of any layout `lcexport.checkpoint` reads.

    Weights that are int8 there are multiplied with their scales in float32 and rounded once.

    Args:
        folder: the released folder, a FastVideo folder, or a DiT folder alone.
        dtype: the bulk dtype, float32 or bfloat16. The islands' weights are float32 in both.
        islands: "checkpoint" keeps the islands' released values; "original" rounds them to
            bfloat16 first, as the original code does when it loads everything in bfloat16.

    Raises:
        InputError: the checkpoint is incomplete, damaged, or contradicts its config.
    """
    if dtype not in BULK_DTYPES:
        raise UsageError("unknown bulk dtype", got=dtype, wanted="torch.float32 or torch.bfloat16")
    if islands not in ("checkpoint", "original"):
        raise UsageError("unknown islands", got=repr(islands), wanted="'checkpoint' or 'original'")
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint)
    tensors = {}
    for name, piece in checkpoint.native().items():
        tensor = read_tensor(piece)
        if is_island(name):
            rounded = tensor.bfloat16() if islands == "original" else tensor
            tensors[name] = rounded.float()
        else:
            tensors[name] = tensor.to(dtype)
    return dit_from_tensors(checkpoint.config, tensors)


def dit_from_tensors(config: DiTConfig, tensors: Mapping[str, Tensor]) -> LongCatDiT:
    """A DiT that uses `tensors` (native names) as its parameters, without copying them.

    Int8 weights are multiplied out, into the dtype of the bulk.
    """
    tensors = dict(dequantised(tensors, tensors[BULK_TENSOR].dtype))
    with torch.device("meta"):
        model = LongCatDiT(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()
