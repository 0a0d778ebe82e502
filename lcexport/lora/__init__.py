"""LoRAs of the original's format: read, merged into weights, put into a bundle and taken out.

file      the format, and whether it fits a model
choice    which file, how strongly
merge     the arithmetic, one tensor at a time
baking    into a finished bundle, and out again
change    how a bundle's files change together or not at all
"""

from lcexport.lora.baking import bake, remove
from lcexport.lora.choice import LoraChoice, choice_from
from lcexport.lora.file import LoraFile, LoraModule, check_fits, check_values, read_lora
from lcexport.lora.merge import Merge, open_merge, shares_of, swapped

__all__ = [
    "LoraChoice",
    "LoraFile",
    "LoraModule",
    "Merge",
    "bake",
    "check_fits",
    "check_values",
    "choice_from",
    "open_merge",
    "read_lora",
    "remove",
    "shares_of",
    "swapped",
]
