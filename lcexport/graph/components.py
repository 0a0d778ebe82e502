"""The text encoder and the VAE's decoder as torch programs whose weights are inputs.

The decoder goes frame by frame, as `lcexport.runtime.decoding` does: what a causal convolution
keeps of the frames before is an output of one call and an input of the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from lcexport.configs.components import TEXT_ENCODER, Component
from lcexport.configs.errors import IncompatibleError
from lcexport.configs.presets import LATENT_CHANNELS, SPATIAL_STRIDE
from lcexport.engines.manifest import PlanRecord, TensorRecord
from lcexport.graph.exporter import quiet_exporter
from lcexport.graph.programs import Program
from lcexport.graph.trace import Untraced
from lcexport.runtime.decoding import empty_past
from lcexport.runtime.text import empty_umt5
from lcexport.runtime.vae import check_vae_config, empty_vae


class EncoderPart(nn.Module):
    """ids int64 [1, L] and mask bool [1, L], True on real tokens, to hidden [1, L, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_1L: Tensor, mask_1L: Tensor) -> Tensor:
        return self.model(input_ids=ids_1L, attention_mask=mask_1L.long()).last_hidden_state


class FramePart(nn.Module):
    """A latent frame [1, 16, 1, H, W] to frames in -1..1, and what the next one needs of it.

    The library keeps one frame of a convolution's input after the first latent frame, the word
    "Rep" where the number of frames doubles, and two frames later. Its convolutions are padded
    with zeros in front, so one frame is two of which the first is zero, and "Rep" is two of zeros:
    with that, every latent frame but the first is one and the same computation.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z_116HW: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        kept: list[Any] = [*past] or empty_past(self.decoder)
        x_116HW = self.post_quant_conv(z_116HW)
        pixels = self.decoder(x_116HW, feat_cache=kept, feat_idx=[0], first_chunk=not past)
        return pixels.clamp(-1, 1), *two_frames(kept)


def two_frames(kept: list[Any]) -> Iterator[Tensor]:
    """The library's cache as two frames [1, C, 2, H, W] in every place that it uses."""
    before = torch.empty(0)
    for past in kept:
        if past is None:
            return
        if isinstance(past, str):  # "Rep": of the same shape as the convolution's before it
            past = torch.zeros_like(before)
        elif past.shape[2] == 1:
            past = torch.cat([torch.zeros_like(past), past], dim=2)
        before = past
        yield past


@dataclass(frozen=True)
class Exported:
    """A program, and its inputs, weights and outputs in order, as the manifest has them."""

    program: ExportedProgram
    plan: PlanRecord


def export_component(
    component: Component, part: str, bundle: Path, dtype: torch.dtype, device: str, file: str
) -> Exported:
    """A component's part on fake tensors: its configuration is read, no weight is.

    Args:
        bundle: the folder with `text_encoder/` and `vae/`.
        dtype: of the weights.
        file: what its package will be called.

    Raises:
        InputError: the configuration is missing or another model's.
        IncompatibleError: a VAE whose decoder does not go frame by frame.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device(device), default_dtype(dtype):
        if component.kind == TEXT_ENCODER:
            drawn = draw_encoder(bundle, *component.size)
        else:
            drawn = draw_decoder(bundle, *component.size, first=part == "first")
        drawn.module.eval().requires_grad_(False)
        weights = dict(drawn.module.named_parameters())
        names = [name.removeprefix(drawn.prefix) for name in weights]
        given = *drawn.inputs.values(), *(torch.empty_like(weight) for weight in weights.values())
        with quiet_exporter(), torch.no_grad():
            program = torch.export.export(Program(drawn, names, dtype), given, strict=False)
    made = [node.meta["val"] for node in program.graph.output_node().args[0]]  # pyright: ignore
    plan = PlanRecord(
        file=file,
        first_block=None,
        last_block=None,
        inputs=records(drawn.inputs),
        weights=records(dict(zip(names, weights.values(), strict=True))),
        outputs=records(dict(zip(drawn.outputs, made, strict=True))),
        attentions=0,
    )
    return Exported(program, plan)


def draw_encoder(bundle: Path, tokens: int) -> Untraced:
    """The text encoder, to be called under a fake tensor mode."""
    inputs = {
        "ids": torch.zeros(1, tokens, dtype=torch.int64),
        "mask": torch.ones(1, tokens, dtype=torch.bool),
    }
    part = EncoderPart(empty_umt5(bundle / "text_encoder"))
    return Untraced("encoder", part, "model.", inputs, ("hidden",))


def draw_decoder(bundle: Path, height: int, width: int, *, first: bool) -> Untraced:
    """The decoder of one latent frame, the first or any other; as `draw_encoder`."""
    check_decoder(bundle / "vae")
    part = FramePart(empty_vae(bundle / "vae"))
    size = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
    inputs = {"latents": torch.zeros(1, LATENT_CHANNELS, 1, *size)}
    with torch.no_grad():
        past = [torch.zeros(past.shape) for past in part(*inputs.values())[1:]]
    kept = {f"past.{i}": frames for i, frames in enumerate(past)}
    outputs = ("pixels", *(f"next.{i}" for i in range(len(kept))))
    if not first:
        inputs |= kept
    return Untraced("first" if first else "later", part, "", inputs, outputs)


def check_decoder(folder: Path) -> None:
    """IncompatibleError: the decoder of this VAE's `config.json` does not go frame by frame."""
    if patch_size := check_vae_config(folder).get("patch_size"):
        raise IncompatibleError(
            "this VAE's decoder cannot be compiled: it makes no frame before the last",
            got=f"patch_size {patch_size}",
            wanted="none",
            do="Leave --compile-components out.",
        )


def records(tensors: dict[str, Tensor]) -> tuple[TensorRecord, ...]:
    """Names, shapes and dtypes as the manifest has them."""
    return tuple(
        TensorRecord(name=name, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for name, t in tensors.items()
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in this dtype: fake ones cannot be cast afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
