"""Convert a whole checkpoint folder between the released layout and FastVideo's, or to int8.

The new folder is written beside its destination under a temporary name and renamed at the end:
the destination is complete or was never touched.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lcexport.checkpoint.checks import check_tensors
from lcexport.checkpoint.compare import check_same
from lcexport.checkpoint.components import check_components
from lcexport.checkpoint.folders import (
    copy_folder,
    folder_bytes,
    model_index,
    translated_config,
    write_json,
)
from lcexport.checkpoint.int8 import QUANTIZATION_CONFIG
from lcexport.checkpoint.layout import Checkpoint, Layout, open_checkpoint
from lcexport.checkpoint.names import Naming
from lcexport.checkpoint.scan import Progress
from lcexport.checkpoint.stream import WriteReport, write_native, write_original
from lcexport.checkpoint.targets import Bulk, Islands, check_choice
from lcexport.configs.errors import ResourceError, UsageError
from lcexport.engines.folders import check_free, new_folder
from lcexport.engines.manifest import FileRecord

To = Literal["original", "native", "int8"]
Dtype = Literal["keep", "bf16", "fp32"]
DIT_FOLDER: dict[To, str] = {"original": "dit", "native": "transformer", "int8": "dit"}
WEIGHTS_FILE: dict[To, str] = {
    "original": "diffusion_pytorch_model.safetensors",
    "native": "model.safetensors",
    "int8": "quantized_model-00001-of-00001.safetensors",
}
INT8_INDEX = "quantized_model.safetensors.index.json"
LORA = "lora"


@dataclass(frozen=True)
class ConvertReport:
    """What was written where. `checked` counts the native tensors compared, 0 without `check`."""

    destination: Path
    layout: Layout
    naming: Naming
    weights: WriteReport
    copied: list[str]
    copied_bytes: int
    checked: int

    def as_dict(self) -> dict[str, object]:
        """The report without the tensors' places."""
        weights = self.weights
        return {
            "destination": str(self.destination),
            "layout": self.layout,
            "naming": self.naming,
            "weights": {
                "file": str(weights.path), "bytes": weights.bytes, "sha256": weights.sha256,
                "tensors": weights.count, "source_tensors_sha256": weights.tensors_sha256,
            },
            "components": self.copied,
            "components_bytes": self.copied_bytes,
            "tensors_checked": self.checked,
        }  # fmt: skip


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: To,
    dtype: Dtype = "keep",
    islands: Islands = "checkpoint",
    check: bool = False,
    on_progress: Progress | None = None,
) -> ConvertReport:
    """Convert a checkpoint folder of any layout.

    A bare DiT folder becomes a bare DiT folder; any other becomes a whole one, with whichever of
    text_encoder, tokenizer, vae, scheduler and lora are there checked and copied as they are.

    Args:
        source: the checkpoint's folder.
        destination: a new folder, or an empty one.
        to: "native" for FastVideo's layout and names, "original" for the released one's; "int8"
            for the released one's with every Linear but the last quantised.
        dtype: "keep" copies the weights' bytes, int8 ones too; "bf16" rounds all but the FP32
            islands; "fp32" rounds nothing. Of "int8" there is only one kind.
        islands: with "bf16": the islands' values as they are, or rounded as the original's.
        check: read both sides again and compare every tensor.
        on_progress: called with source bytes done and in total, first for writing, then for
            checking; it may raise to stop.

    Raises:
        InputError: the source is not a sound checkpoint.
        ResourceError: the destination is taken, its parent is missing, or the disk is full.
        UsageError: `to`, `dtype` or `islands` make no sense.
        VerificationError: `check` found a difference; the message names the tensor.
    """
    destination = Path(destination).absolute()
    checkpoint = _checked_source(Path(source), destination, to, dtype, islands)
    with new_folder(destination) as folder:
        dit_folder = folder / DIT_FOLDER[to] if checkpoint.layout != "dit" else folder
        copied = _copy_components(checkpoint, folder)
        bulk: Bulk = "int8" if to == "int8" else dtype
        weights = _write_dit(checkpoint, dit_folder, to, bulk, islands, on_progress)
        layout: Layout = _layout_of(checkpoint, to)
        if layout == "fastvideo":
            write_json(folder / "model_index.json", model_index(list(checkpoint.components)))
        checked = 0
        if check:
            written = open_checkpoint(folder)
            checked = check_same(
                checkpoint, written, bulk=bulk, islands=islands, on_progress=on_progress
            )
    final = destination / weights.path.relative_to(folder)
    size = sum(record.bytes for records in copied.values() for record in records.values())
    return ConvertReport(
        destination, layout, naming_of(to), weights.moved(final), list(copied), size, checked
    )


def naming_of(to: To) -> Naming:
    """The names a conversion writes."""
    return "native" if to == "native" else "original"


def _checked_source(
    source: Path, destination: Path, to: str, dtype: Dtype, islands: Islands
) -> Checkpoint:
    """Everything that can be refused before a byte is written."""
    if to not in DIT_FOLDER or dtype not in get_args(Dtype):
        raise UsageError(
            "unknown kind of conversion", got=f"to={to!r}, dtype={dtype!r}",
            wanted="to native, original or int8, dtype keep, bf16 or fp32",
        )  # fmt: skip
    if to == "int8" and dtype != "keep":
        raise UsageError("an int8 checkpoint has no other dtype", got=f"dtype={dtype!r}")
    check_choice(dtype, islands)
    check_free(destination)
    checkpoint = open_checkpoint(source)
    check_tensors(checkpoint)
    check_components(checkpoint)
    if destination.resolve().is_relative_to(source.resolve()):
        raise UsageError("the destination is inside the checkpoint", got=destination)
    return checkpoint


def _layout_of(checkpoint: Checkpoint, to: To) -> Layout:
    if checkpoint.layout == "dit":
        return "dit"
    return "fastvideo" if to == "native" else "released"


def _write_dit(
    checkpoint: Checkpoint,
    dit_folder: Path,
    to: To,
    bulk: Bulk,
    islands: Islands,
    on_progress: Progress | None,
) -> WriteReport:
    dit_folder.mkdir(exist_ok=True)
    source = checkpoint.dit_folder / "config.json"
    config = translated_config(source, checkpoint.config, naming_of(to))
    write_json(dit_folder / "config.json", config)
    write = write_native if to == "native" else write_original
    written = write(
        checkpoint, dit_folder / WEIGHTS_FILE[to], bulk=bulk, islands=islands,
        on_progress=on_progress,
    )  # fmt: skip
    if to == "int8":
        write_json(dit_folder / INT8_INDEX, shards_index(written))
        write_json(dit_folder / "quantization_config.json", QUANTIZATION_CONFIG)
    return written


def shards_index(written: WriteReport) -> dict[str, object]:
    """The index of a checkpoint of one shard."""
    size = sum(info.bytes for info in written.tensors.values())
    weight_map = dict.fromkeys(written.tensors, written.path.name)
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _copy_components(checkpoint: Checkpoint, folder: Path) -> dict[str, dict[str, FileRecord]]:
    """Copy the folders beside the DiT; name -> what was copied."""
    sources = dict(checkpoint.components)
    if checkpoint.layout != "dit" and (checkpoint.folder / LORA).is_dir():
        sources[LORA] = checkpoint.folder / LORA
    needed = sum(folder_bytes(path) for path in sources.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            "the disk is too small for the components", got=f"{free} bytes free", wanted=needed,
            do="Free some space or choose another disk.",
        )  # fmt: skip
    return {name: copy_folder(path, folder / name) for name, path in sources.items()}
