"""A distilled-schedule LoRA for the small DiT: few steps, no guidance.

At the noise levels of the distilled schedule the DiT with the LoRA learns, in one pass, the
velocity that the DiT without it has under guidance, which takes two.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcexport.configs.dit import DiTConfig
from lcexport.dit.model import LongCatDiT
from lcexport.lora.file import ALPHA, DOT, DOWN, PREFIX, UP, linears
from lcexport.runtime.guidance import cfg_zero
from lcexport.runtime.schedule import schedule
from tools.train_toy.dit import Batches
from tools.train_toy.training import Plan, Training, generator_at

SEED = 6
RANK = 8
ALPHA_SCALE = 0.5
STEPS = 16
GUIDANCE_SCALE = 4.0
PLAN = Plan(steps=400, rate=1e-3, warmup=20, weight_decay=0.0, average=0.98)
BATCH = 32
IN_BLOCKS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear",
             "cross_attn.proj", "ffn.w1", "ffn.w2", "ffn.w3")  # fmt: skip


class Change(nn.Module):
    """What is added to a Linear's output: up(down(x)), scaled. Nothing at first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        width = linear.in_features
        self.down = nn.Parameter(torch.randn(RANK, width) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return ALPHA_SCALE * (x @ self.down.T) @ self.up.T


def natives(config: DiTConfig) -> dict[str, tuple[str, ...]]:
    """The modules that the LoRA changes by the release's names, and their parts by ours."""
    return {
        name: tuple(native.removesuffix(".weight") for native in pair.natives)
        for name, pair in linears(config).items()
        if name.startswith("blocks.") and name.endswith(IN_BLOCKS)
    }


class Lora(nn.Module):
    """A change for each part; `on` adds them to a DiT's modules while the block runs."""

    def __init__(self, dit: LongCatDiT) -> None:
        super().__init__()
        self.dit = [dit]  # in a list: its parameters are not this module's
        self.parts = natives(dit.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.changes = nn.ModuleDict(
                {
                    part.replace(".", "-"): Change(dit.get_submodule(part))  # pyright: ignore
                    for parts in self.parts.values()
                    for part in parts
                }
            )

    def change(self, part: str) -> Change:
        return self.changes[part.replace(".", "-")]  # pyright: ignore[reportReturnType]

    @contextmanager
    def on(self) -> Iterator[LongCatDiT]:
        (dit,) = self.dit
        handles = [
            dit.get_submodule(part).register_forward_hook(partial(add, self.change(part)))
            for parts in self.parts.values()
            for part in parts
        ]
        try:
            yield dit
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self) -> dict[str, Tensor]:
        """As the original's files hold them: of joined modules one `down`, and blocks of `up`."""
        found = {}
        for name, parts in self.parts.items():
            key = PREFIX + name.replace(".", DOT)
            changes = [self.change(part) for part in parts]
            found[f"{key}.{DOWN}"] = torch.cat([change.down for change in changes]).bfloat16()
            for j, change in enumerate(changes):
                up = UP if len(parts) == 1 else f"lora_up.blocks.{j}.weight"
                found[f"{key}.{up}"] = change.up.bfloat16()
            found[f"{key}.{ALPHA}"] = torch.tensor(ALPHA_SCALE)
        return {key: tensor.detach().contiguous() for key, tensor in found.items()}


def add(change: Change, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook."""
    return output + change(inputs[0])


def loss_at(lora: Lora, batches: Batches, step: int) -> dict[str, Tensor]:
    """Squared difference from the guided velocity of the DiT alone."""
    generator = generator_at(SEED, step)
    (dit,) = lora.dit
    timesteps = schedule(STEPS, distill=True).timesteps
    sigma_B = timesteps[torch.randint(STEPS, (BATCH,), generator=generator)] / 1000
    batch = batches.noised(sigma_B, given=0, generator=generator)
    with torch.no_grad():
        cond = dit(batch.x, batch.text, batch.timestep_BT, batch.mask)
        text, mask = batches.reader.encode([""])
        text, mask = text.unsqueeze(1).expand_as(batch.text), mask.expand_as(batch.mask)
        uncond = dit(batch.x, text, batch.timestep_BT, mask)
    wanted = cfg_zero(cond, uncond, GUIDANCE_SCALE)
    with lora.on():
        velocity = dit(batch.x, batch.text, batch.timestep_BT, batch.mask)
    return {"velocity": (velocity - wanted).square().mean()}


def train_lora(dit: LongCatDiT, batches: Batches, folder: Path, plan: Plan = PLAN) -> Path:
    """Train, or go on training, in `folder`; the finished file."""
    lora = Lora(dit.requires_grad_(False))
    training = Training(lora, plan, folder, "lora")
    training.run(partial(loss_at, lora, batches))
    training.assign(training.averaged)
    path = folder / "cfg_step_lora.safetensors"
    save_file(lora.tensors(), path)
    return path
