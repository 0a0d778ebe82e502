"""What `load` makes sure of before anything heavy is read: scheduler, device, engine."""

import json
import math

import torch

from lcexport.configs.errors import IncompatibleError, InputError, UsageError
from lcexport.engines import Engine
from lcexport.engines.bundle import Bundle, GraphRecord
from lcexport.runtime.denoiser import input_spec

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def read_shift(bundle: Bundle) -> float:
    """The flow-match shift of the bundle's scheduler; its other keys play no part.

    Raises:
        IntegrityError: the bundle has no scheduler configuration.
        InputError: it holds no usable shift.
    """
    path = bundle.path(SCHEDULER_CONFIG)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    shift = config.get("shift") if isinstance(config, dict) else None
    if isinstance(shift, int | float) and math.isfinite(shift) and shift > 0:
        return float(shift)
    raise InputError(f"{path}: no usable shift", got=repr(shift), wanted="a number above 0")


def check_device(device: str) -> torch.device:
    """The device, if torch knows it and has it."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError("unknown device", got=repr(device), wanted="cpu or cuda") from error
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
