"""LoRAs into a finished bundle, and out again.

`bake` writes a new weights file of the base's and replaces the old one, which it keeps whole under
`lora/base`; `remove` puts it back. The header and with it every tensor's place stay, so graphs and
plans need no change. Golden outputs are those of the weights that are in: they are computed anew,
or left out, and the base's are kept with the base.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from lcexport.checkpoint import Progress, native_checkpoint, read_header, write_native
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError, IntegrityError, ResourceError, UsageError
from lcexport.eager import DitEngine, dit_from_files, require
from lcexport.engines.bundle import Bundle, check_file, open_bundle
from lcexport.engines.files import sha256_of, write_bytes
from lcexport.engines.host import available_memory_bytes
from lcexport.engines.manifest import (
    DIT_CONFIG,
    LORA_BASE,
    MANIFEST,
    WEIGHTS,
    FileRecord,
    LoraRecord,
    Manifest,
    manifest_json,
)
from lcexport.golden import make_golden
from lcexport.lora.change import changed_files, keep_same, locked_bundle
from lcexport.lora.choice import LoraChoice
from lcexport.lora.merge import open_merge

Files = dict[str, FileRecord]


def bake(
    folder: str | Path,
    choices: Sequence[LoraChoice],
    *,
    golden: bool = True,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Bundle:
    """Make the bundle's weights the base's with exactly these LoRAs; those baked before go.

    Args:
        golden: whether to compute the outputs that `verify` compares with. They need the whole
            model in memory; without them the memory is that of a few chunks, and `verify` says
            that it has nothing to compare with.
        device: where to compute them.
        on_progress: called with the bytes done and in total while the weights are written.

    Raises:
        InputError: a LoRA is not readable, not understood whole, or does not fit.
        IncompatibleError: the bundle has TensorRT plans whose weights cannot be exchanged.
        IntegrityError: no bundle, or a damaged one; the base's weights are hashed first.
        ResourceError: disk or memory will not do.
        LockedError: something else is writing the bundle.
        UsageError: no LoRA was named.
    """
    folder = Path(folder)
    if not choices:
        raise UsageError("no LoRA was named", do="`lcexport lora remove` gives back the base.")
    with locked_bundle(folder) as (bundle, _):
        old = bundle.manifest
        if old.weights_dtype == "int8":
            raise IncompatibleError(
                f"the weights of {folder} are int8, to which a LoRA cannot be added",
                do="Build the bundle with --weights-dtype bulk.",
            )
        merge = open_merge(choices, DiTConfig.from_json(bundle.path(DIT_CONFIG)))
        baked = (record.model_copy(update={"baked": True}) for record in merge.records)
        loras = (*built_in(old), *baked)
        names = golden_names(old) if golden else {}
        there = {name: graph.golden for name, graph in old.graphs.items() if graph.golden}
        if loras == old.loras and there == names:
            return bundle
        refuse_fixed_plans(bundle)
        refuse_golden(old, names, device)
        check_base(bundle)
        with changed_files(folder) as staged:
            weights = base_path(bundle, WEIGHTS)
            report = write_native(
                native_checkpoint(bundle.path(DIT_CONFIG), weights),
                staged / WEIGHTS,
                bulk=old.precision,
                islands=old.islands,
                deltas=merge,
                on_progress=on_progress,
            )
            require_same_places(weights, staged / WEIGHTS)
            new = {WEIGHTS: FileRecord(bytes=report.bytes, sha256=report.sha256)}
            new |= kept_base(bundle, staged)
            new |= write_golden(bundle, names, staged, device)
            write_manifest(staged, changed(old, loras, new, names))
    return open_bundle(folder)


def remove(folder: str | Path, *, golden: bool = True, device: str = "cpu") -> Bundle:
    """Give the bundle its base's weights and golden outputs back, byte for byte.

    Args:
        golden, device: for resolutions that were added while the LoRAs were in.

    Raises:
        UsageError: no LoRA was baked in.
        IntegrityError: no bundle, or a damaged one; the base's weights are hashed first.
        LockedError: something else is writing the bundle.
    """
    folder = Path(folder)
    with locked_bundle(folder) as (bundle, finished):
        old = bundle.manifest
        if not old.baked:
            if finished:
                return bundle
            raise nothing_baked(bundle)
        names = golden_names(old)
        kept = {name for name in names.values() if f"{LORA_BASE}/{name}" in old.files}
        made = {res: name for res, name in names.items() if name not in kept}
        made = made if golden else {}
        refuse_golden(old, made, device)
        check_base(bundle)
        with changed_files(folder) as staged:
            new = {}
            for name in (WEIGHTS, *kept):
                keep_same(base_path(bundle, name), staged / name)
                new[name] = old.files[f"{LORA_BASE}/{name}"]
            new |= write_golden(bundle, made, staged, device)
            back = {res: name for res, name in names.items() if name in kept} | made
            write_manifest(staged, changed(old, built_in(old), new, back))
    return open_bundle(folder)


def built_in(manifest: Manifest) -> tuple[LoraRecord, ...]:
    """The LoRAs that the bundle was built with: part of its base."""
    return tuple(record for record in manifest.loras if not record.baked)


def nothing_baked(bundle: Bundle) -> UsageError:
    names = ", ".join(record.name for record in bundle.manifest.loras)
    return UsageError(
        f"no LoRA was baked into the bundle {bundle.folder}",
        got=f"{names}, built in" if names else None,
        do="What `lcexport build --lora` put in stays: build without." if names else None,
    )


def golden_names(manifest: Manifest) -> dict[str, str]:
    """The golden file of each resolution that has one now, or had with the base's weights."""
    found = {}
    for resolution, graph in manifest.graphs.items():
        usual = f"golden/{resolution}.safetensors"
        if graph.golden or f"{LORA_BASE}/{usual}" in manifest.files:
            found[resolution] = graph.golden or usual
    return found


def base_path(bundle: Bundle, name: str) -> Path:
    """Where a file of the base is now."""
    kept = f"{LORA_BASE}/{name}"
    return bundle.path(kept if kept in bundle.manifest.files else name)


def check_base(bundle: Bundle) -> None:
    """Hash the base's weights: a new digest over damaged ones would make them look sound."""
    path = base_path(bundle, WEIGHTS)
    record = bundle.manifest.files[path.relative_to(bundle.folder).as_posix()]
    check_file(path, record, hashed=True)


def kept_base(bundle: Bundle, staged: Path) -> Files:
    """Put the base's files, where they are not yet, under `lora/base`; they are not copied."""
    if bundle.manifest.baked:
        return {}
    kept = {}
    for name in (WEIGHTS, *golden_names(bundle.manifest).values()):
        keep_same(bundle.path(name), staged / LORA_BASE / name)
        kept[f"{LORA_BASE}/{name}"] = bundle.manifest.files[name]
    return kept


def require_same_places(base: Path, baked: Path) -> None:
    """Every graph refers to byte ranges of the weights file: they must be where they were."""
    headers = [read_header(path).tensors for path in (base, baked)]
    places = [{name: (t.dtype, t.start, t.end) for name, t in header.items()} for header in headers]
    if places[0] != places[1]:
        raise IntegrityError(
            f"the tensors of {base} lie where this lcexport would not write them",
            do="Rebuild the bundle with this lcexport.",
        )


def refuse_fixed_plans(bundle: Bundle) -> None:
    """IncompatibleError where a TensorRT engine would go on with the weights it was compiled with.

    Plans that take their weights from outside, or are stripped of them, read the bundle's when they
    are opened; plans that can be refitted are, in a bundle with baked LoRAs. ONNX Runtime refits
    none of the plans it is handed.
    """
    fixed = [
        f"{backend} for {resolution}"
        for backend, engines in bundle.manifest.engines.items()
        for resolution, engine in engines.items()
        if not engine.takes_weights
    ]
    if fixed:
        raise IncompatibleError(
            f"plans in {bundle.folder} hold weights that cannot be exchanged",
            got=", ".join(fixed),
            wanted="plans built with --weights shared, --trt strip_plan=true or --trt refit=true, "
            "without --ep-context",
            do="Build the bundle with `lcexport build --lora`, or with such plans.",
        )


def refuse_golden(manifest: Manifest, names: dict[str, str], device: str) -> None:
    """Refuse now what eager torch would refuse after the weights: its device, its memory."""
    if not names:
        return
    require("eager", manifest.precision, torch.device(device))
    needed, free = manifest.files[WEIGHTS].bytes, available_memory_bytes()
    if device == "cpu" and needed > free:
        raise ResourceError(
            "the golden outputs for the new weights need the whole model in memory",
            got=f"{free / 1e9:.2f} GB available",
            wanted=f"{needed / 1e9:.2f} GB and more",
            do="Use --device cuda, or --no-golden: `verify` then has nothing to compare with.",
        )


def write_golden(bundle: Bundle, names: dict[str, str], staged: Path, device: str) -> Files:
    """Golden data of the staged weights for these resolutions, by eager torch."""
    if not names:
        return {}
    dit = dit_from_files(bundle.path(DIT_CONFIG), staged / WEIGHTS, device)
    made = {}
    for resolution, name in names.items():
        record = bundle.graph(resolution)
        with DitEngine(dit, record, torch.device(device)) as engine:
            data = save(make_golden(engine, record.job.num_cond_latents))
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        made[name] = FileRecord(bytes=len(data), sha256=sha256_of(path))
    return made


def changed(
    old: Manifest, loras: tuple[LoraRecord, ...], new: Files, golden: dict[str, str]
) -> Manifest:
    """The manifest with other LoRAs, these new files, and golden data for these resolutions."""
    gone = set(golden_names(old).values()) - set(golden.values())
    if not any(record.baked for record in loras):
        gone |= {name for name in old.files if name.startswith(f"{LORA_BASE}/")}
    files = {name: record for name, record in old.files.items() if name not in gone}
    graphs = {
        name: graph.model_copy(update={"golden": golden.get(name)})
        for name, graph in old.graphs.items()
    }
    return old.model_copy(update={"loras": loras, "files": files | new, "graphs": graphs})


def write_manifest(staged: Path, manifest: Manifest) -> None:
    write_bytes(staged / MANIFEST, manifest_json(manifest))
