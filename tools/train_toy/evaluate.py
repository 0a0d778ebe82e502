"""How often a bundle of the toy shows what it is asked for.

    python -m tools.train_toy.evaluate BUNDLE [--backend NAME] [--prompts 50] [--distill]

The prompts are about combinations of colour, shape and direction that training never saw, the same
ones every time; prompt i is sampled with seed i.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from lcexport.runtime import Pipeline, load
from tools.train_toy.score import Reading, accuracy, read
from tools.train_toy.training import generator_at
from tools.train_toy.world import ATTRIBUTES, Scene, full_caption, scenes

SEED = 5
PROMPTS = 50


def held_scenes(count: int = PROMPTS) -> list[Scene]:
    """So many different scenes of the combinations that were held back."""
    options = scenes(held=True)
    order = torch.randperm(len(options), generator=generator_at(SEED)).tolist()
    return [options[place] for place in order[:count]]


def readings(
    pipe: Pipeline, wanted: list[Scene], **options: object
) -> Iterator[tuple[Scene, Reading]]:
    """Each scene, and what the pipeline shows when it is asked for it."""
    for seed, scene in enumerate(wanted):
        video = pipe.generate(full_caption(scene), seed=seed, **options)  # pyright: ignore
        yield scene, read(video.frames)


def main() -> None:
    arguments = parsed()
    options = {
        name: value
        for name in ("steps", "guidance_scale", "distill")
        if (value := getattr(arguments, name)) is not None
    }
    with load(arguments.bundle, "toy", arguments.backend, "cpu") as pipe:
        rows = list(readings(pipe, held_scenes(arguments.prompts), **options))
    for scene, reading in rows:
        wrong = [name for name, right in reading.agrees(scene).items() if not right]
        print(f"{full_caption(scene):66} fit {reading.fit:.2f}  {', '.join(wrong)}")
    found = accuracy(rows)
    print("  ".join(f"{name} {found[name]:.0%}" for name in ATTRIBUTES))
    if arguments.json:
        report = {"prompts": len(rows), "backend": arguments.backend, **options, "accuracy": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_toy.evaluate")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--distill", action="store_const", const=True)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
