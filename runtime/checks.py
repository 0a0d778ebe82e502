"""What `load` makes sure of before anything heavy is read: scheduler, device, engine, files."""

from pathlib import Path

import torch

from lcexport.configs.errors import IncompatibleError, InputError, IntegrityError
from lcexport.engines import Engine, device_from
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import WEIGHTS, GraphRecord
from lcexport.runtime.loading import DOWNLOAD_AGAIN, is_finite_number, read_config

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def read_shift(path: Path) -> float:
    """The flow-match shift of a scheduler's configuration; its other keys play no part.

    Raises:
        InputError: the file is missing or damaged, or holds no usable shift.
    """
    shift = read_config(path).get("shift")
    if is_finite_number(shift) and shift > 0:
        return float(shift)
    raise InputError(
        f"{path}: no usable shift", got=repr(shift), wanted="a number above 0", do=DOWNLOAD_AGAIN
    )


def check_device(device: str) -> torch.device:
    """The device, if engines run on its kind and torch has it."""
    where = device_from(device)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise IncompatibleError(
            "torch sees no such GPU",
            got=f"{torch.cuda.device_count()} GPUs",
            wanted=device,
            do="Install a CUDA build of torch and a driver, or use device 'cpu'.",
        )
    return where


def check_engine(engine: Engine, graph: GraphRecord) -> None:
    """Refuse an engine whose inputs are not the graph's; its batch may be another."""
    found = [(spec.name, spec.shape[1:]) for spec in engine.inputs]
    wanted = [(tensor.name, tensor.shape[1:]) for tensor in graph.inputs]
    if sorted(found) != sorted(wanted):
        named = dict(wanted)
        other = next((pair for pair in found if named.get(pair[0]) != pair[1]), ("nothing", ()))
        raise IncompatibleError(
            f"the engine was not made for the graph {graph.name}",
            got=f"{other[0]} {list(other[1])}",
            wanted=f"{list(named.get(other[0], ()))}, of {', '.join(named)}",
        )


def check_only_weights_differ(old: Bundle, new: Bundle) -> None:
    """IntegrityError where a file is another that an opened bundle goes on using.

    Baking LoRAs exchanges the weights and the golden data; `build --add` adds files.
    """
    exchanged = (WEIGHTS, "golden/", "lora/")
    kept = {n: r for n, r in old.manifest.files.items() if not n.startswith(exchanged)}
    other = [name for name, record in kept.items() if new.manifest.files.get(name) != record]
    if other:
        raise IntegrityError(
            f"more than the weights of {old.folder} was exchanged since it was opened",
            got=", ".join(other[:5]),
            do="Close the pipeline and load the bundle again.",
        )
