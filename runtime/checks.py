"""What `load` makes sure of before anything heavy is read: scheduler, device, engine."""

from pathlib import Path

import torch

from lcexport.configs.errors import IncompatibleError, InputError, UsageError
from lcexport.engines import Engine, device_from
from lcexport.engines.bundle import GraphRecord
from lcexport.runtime.denoiser import input_spec
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
    """Refuse an engine whose shapes are not the graph's, and a graph for another task."""
    if graph.num_cond_latents:
        raise UsageError(
            "this graph continues given frames and cannot start from text alone",
            got=f"{graph.num_cond_latents} conditioning latents",
            wanted=0,
        )
    latents = input_spec(engine, "hidden_states").shape[1:]
    tokens = input_spec(engine, "encoder_attention_mask").shape[1]
    wanted = (graph.preset.latent_shape, graph.preset.text_tokens)
    if (latents, tokens) != wanted:
        raise IncompatibleError(
            "the engine was made for other shapes",
            got=f"latents {list(latents)}, {tokens} text tokens",
            wanted=f"latents {list(wanted[0])}, {wanted[1]} text tokens",
        )
