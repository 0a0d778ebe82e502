"""From nothing to the small checkpoint: `python -m tools.train_toy --out FOLDER`.

What is in FOLDER is not made again, so a stopped training is continued by the same command. The
checkpoint is FOLDER/checkpoint. Of two processes in one FOLDER the second waits for what the first
is making.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from lcexport.configs.errors import LcexportError
from tools.train_toy.checkpoint import write_checkpoint
from tools.train_toy.dit import Batches, train_dit
from tools.train_toy.latents import encode_clips, statistics
from tools.train_toy.lora import train_lora
from tools.train_toy.text import train_text
from tools.train_toy.vae import train_decoder, train_encoder


def main() -> None:
    arguments = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    folder = arguments.out
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        print(f"the training is finished: {checkpoint}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    reader = train_text(folder)
    vae = train_encoder(folder)
    if arguments.decoder:
        train_decoder(vae, folder)
        return
    latents = encode_clips(vae, folder)
    channels = statistics(latents)
    batches = Batches(latents, channels, reader)
    dit = train_dit(folder, batches)
    lora = train_lora(dit, batches, folder)
    train_decoder(vae, folder)
    write_checkpoint(checkpoint, dit, vae, channels, reader, lora)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_toy", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="what is made, and continued")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--decoder",
        action="store_true",
        help="train the VAE's decoder and stop: a second process for the second core",
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except LcexportError as error:
        sys.exit(f"error: {error}")
