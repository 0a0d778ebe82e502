"""The native DiT: LongCat-Video's transformer in plain torch, written for export."""

from lcexport.configs.dit import DiTConfig
from lcexport.dit.layers import Geometry
from lcexport.dit.load import dit_from_tensors, load_dit
from lcexport.dit.model import LongCatDiT

__all__ = ["DiTConfig", "Geometry", "LongCatDiT", "dit_from_tensors", "load_dit"]
