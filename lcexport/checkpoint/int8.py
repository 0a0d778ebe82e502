"""Int8 weights: one scale per output row, symmetric; the arithmetic and the names.

    scale = max(|row|, 1e-8) / 127      float32, one a row
    q     = round(weight / scale)       int8
    q * scale                           the weight that is computed with, at most scale / 2 away

A quantised Linear holds `weight_int8` [rows, columns] and `weight_scale` [rows] where a float one
holds `weight` [rows, columns], under either naming. LongCat's own quantised checkpoints hold every
Linear that way but the last, the islands' too; a bundle with int8 weights only those of the bulk.
"""

from collections.abc import Container, Iterator, Mapping

import torch

from lcexport.checkpoint.names import Naming, Shape, name_pairs
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError

WEIGHT, INT8, SCALE = ".weight", ".weight_int8", ".weight_scale"
SMALLEST = 1e-8  # of a row's largest magnitude: a row of zeros needs a scale, too
MOST, LEAST = 127, -128
DTYPES = {INT8: "I8", SCALE: "F32"}  # by the name's ending, as safetensors calls them
QUANTIZATION_CONFIG = {
    "quantization_method": "int8_per_channel_symmetric",
    "skip_patterns": ["final_layer.linear"],
    "description": "Weight-only INT8 quantization with per-channel symmetric scaling",
}


def int8_names(weight: str) -> tuple[str, str]:
    """Names of the two tensors that stand for `weight`: the integers and their scales."""
    stem = weight.removesuffix(WEIGHT)
    return stem + INT8, stem + SCALE


def stored_tensors(config: DiTConfig, naming: Naming, present: Container[str]) -> dict[str, Shape]:
    """Name -> shape of what a file must hold, where `present` says which Linears are quantised.

    One of a pair's two tensors is enough to be taken for quantised: the other is then missing.
    """
    stored: dict[str, Shape] = {}
    for pair in name_pairs(config):
        names = (pair.original,) if naming == "original" else pair.natives
        shape = pair.shape if naming == "original" else pair.native_shape
        for name in names:
            quantised, scale = int8_names(name)
            if pair.is_quantisable and (quantised in present or scale in present):
                stored |= {quantised: shape, scale: shape[:1]}
            else:
                stored[name] = shape
    return stored


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Any float [rows, columns] -> int8 of that shape and float32 [rows]."""
    values = weight.float()
    scale = values.abs().amax(dim=1).clamp(min=SMALLEST) / MOST
    return (values / scale[:, None]).round().clamp(LEAST, MOST).to(torch.int8), scale


def dequantise(quantised: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Int8 [rows, columns] and float32 [rows] -> float32 [rows, columns]."""
    return quantised.float() * scale[:, None]


def dequantised(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors with each int8 weight as it is computed with, rounded once to `dtype`."""
    for name, tensor in tensors.items():
        if name.endswith(INT8):
            weight = name.removesuffix(INT8) + WEIGHT
            yield weight, dequantise(tensor, tensors[int8_names(weight)[1]]).to(dtype)
        elif not name.endswith(SCALE):
            yield name, tensor


def check_scale(scale: torch.Tensor, where: str) -> None:
    """InputError unless every scale is positive, and finite also when multiplied by 128."""
    scale = scale.flatten()
    wrong = ~((scale > 0) & (scale * -LEAST).isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"{where} is no scale in row {row}", got=float(scale[row]),
            wanted="a positive, finite number", do="Download the file again, or quantise again.",
        )  # fmt: skip
