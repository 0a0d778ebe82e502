"""Checkpoints: find them, check them, read them in bounded memory, convert them.

names       the one table of tensor names, original and native
shards      one file, or shards and their index
int8        quantised weights: names and arithmetic
layout      which folder layout, configuration and naming; `open_checkpoint`
checks      tensors found against tensors the configuration calls for
components  text encoder, tokenizer, VAE and scheduler, as their loaders will read them
reading     byte ranges to chunks or tensors
scan        digests, NaN and infinity
targets     what a written file holds: splits, joins and casts
stream      write it; `write_native`, `write_original`
folders     configurations and components around the weights
compare     prove a written checkpoint against its source
convert     whole folders, either way, or to int8
validate    one report on everything
"""

from lcexport.checkpoint.checks import check_tensors, problems
from lcexport.checkpoint.compare import check_same
from lcexport.checkpoint.components import check_components
from lcexport.checkpoint.convert import ConvertReport, convert
from lcexport.checkpoint.folders import copy_folder
from lcexport.checkpoint.int8 import dequantised, int8_names
from lcexport.checkpoint.layout import (
    Checkpoint,
    Layout,
    Piece,
    native_checkpoint,
    open_checkpoint,
)
from lcexport.checkpoint.names import Naming, expected_tensors, is_island
from lcexport.checkpoint.reading import read_tensor
from lcexport.checkpoint.scan import Progress, ScanReport, scan_tensors, tensors_digest
from lcexport.checkpoint.stream import Deltas, WriteReport, write_native, write_original
from lcexport.checkpoint.targets import Bulk, Islands
from lcexport.checkpoint.validate import ValidationReport, validate
from lcexport.engines.header import Header, TensorInfo, read_header

__all__ = [
    "Bulk",
    "Checkpoint",
    "ConvertReport",
    "Deltas",
    "Header",
    "Islands",
    "Layout",
    "Naming",
    "Piece",
    "Progress",
    "ScanReport",
    "TensorInfo",
    "ValidationReport",
    "WriteReport",
    "check_components",
    "check_same",
    "check_tensors",
    "convert",
    "copy_folder",
    "dequantised",
    "expected_tensors",
    "int8_names",
    "is_island",
    "native_checkpoint",
    "open_checkpoint",
    "problems",
    "read_header",
    "read_tensor",
    "scan_tensors",
    "tensors_digest",
    "validate",
    "write_native",
    "write_original",
]
