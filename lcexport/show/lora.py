"""A LoRA: what it changes, and whether it fits; and what is in a bundle."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import LoraRecord
from lcexport.show.console import amount, out, show_fact, show_text, table

if TYPE_CHECKING:
    from lcexport.lora import LoraFile, LoraModule


def show_lora(lora: LoraFile, fits: str | None) -> None:
    """Its modules, those that differ only in the block's number in one row."""
    kinds: dict[tuple[str, str, int, int, float], int] = {}
    for module in lora.modules.values():
        key = kind_of(module)
        kinds[key] = kinds.get(key, 0) + 1
    show_fact("lora", f"{lora.path}, {amount(lora.bytes)}, {len(lora.modules):,} modules")
    rows = table("Modules", "module", ">count", "weight", ">rank", ">blocks", ">alpha scale")
    for (name, shape, rank, blocks, alpha), count in kinds.items():
        rows.add_row(name, str(count), shape, str(rank), str(blocks), f"{alpha:g}")
    out.print(rows)
    if fits:
        show_fact("fits", fits)


def kind_of(module: LoraModule) -> tuple[str, str, int, int, float]:
    """What modules of one row have in common."""
    name = re.sub(r"^blocks\.\d+\.", "blocks.*.", module.module)
    shape = f"{module.out_features} x {module.in_features}"
    return name, shape, module.rank, len(module.ups), module.alpha_scale


def lora_document(lora: LoraFile, fits: bool | None) -> dict[str, object]:
    """The same for scripts, module by module."""
    modules = {
        name: {
            "shape": [module.out_features, module.in_features],
            "rank": module.rank,
            "blocks": len(module.ups),
            "alpha_scale": module.alpha_scale,
        }
        for name, module in lora.modules.items()
    }
    return {"path": lora.path, "bytes": lora.bytes, "fits": fits, "modules": modules}


def lora_text(record: LoraRecord) -> str:
    """One LoRA of a manifest in a few words."""
    how = "baked" if record.baked else "built in"
    return f"{record.name} x {record.strength:g} ({how}, sha256 {record.sha256[:16]})"


def show_loras(bundle: Bundle) -> None:
    """What is in a bundle's weights now."""
    manifest = bundle.manifest
    loras = ", ".join(map(lora_text, manifest.loras))
    show_text(f"{bundle.folder}: {loras or 'the base, no LoRA'}")
    lacking = [name for name, graph in manifest.graphs.items() if graph.golden is None]
    if lacking and manifest.baked:
        show_text(f"no golden outputs for {', '.join(lacking)}: `verify` cannot compare engines")
