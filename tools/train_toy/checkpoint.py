"""The trained parts as a checkpoint in the released folder layout, in bfloat16."""

from copy import deepcopy
from pathlib import Path
from shutil import copyfile

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from lcexport.checkpoint.names import name_pairs
from lcexport.demo import TOY_DIGESTS, write_dit, write_scheduler
from lcexport.dit.model import LongCatDiT
from lcexport.engines.files import sha256_of
from lcexport.engines.folders import new_folder
from tools.train_toy.latents import Statistics
from tools.train_toy.text import TextReader


def write_checkpoint(
    folder: Path,
    dit: LongCatDiT,
    vae: AutoencoderKLWan,
    statistics: Statistics,
    reader: TextReader,
    lora: Path,
) -> None:
    """Write to `folder`, which must be free."""
    with new_folder(folder) as temporary:
        write_dit(temporary / "dit", dit.config, original_weights(dit))
        small_vae = deepcopy(vae).bfloat16()
        small_vae.register_to_config(latents_mean=statistics.mean, latents_std=statistics.std)
        small_vae.save_pretrained(temporary / "vae")
        deepcopy(reader.encoder).bfloat16().save_pretrained(temporary / "text_encoder")
        reader.tokenizer.save_pretrained(temporary / "tokenizer")
        write_scheduler(temporary / "scheduler")
        (temporary / "lora").mkdir()
        copyfile(lora, temporary / "lora" / lora.name)
        write_digests(temporary)


def write_digests(folder: Path) -> None:
    """Every file's SHA-256, as `sha256sum --check` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / TOY_DIGESTS).write_text("".join(lines), "utf-8")


def original_weights(dit: LongCatDiT) -> dict[str, Tensor]:
    """By the release's names, queries, keys and values joined; bfloat16."""
    native = dit.state_dict()
    return {
        pair.original: torch.cat([native[name] for name in pair.natives]).bfloat16()
        for pair in name_pairs(dit.config)
    }
