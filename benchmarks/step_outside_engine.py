"""What a guided step costs outside the engine: `python benchmarks/step_outside_engine.py`.

The runtime's own loop and buffers around an engine that only fills its output, at a preset's
latents, with both branches in two calls and in one. One thread: these operations are small. What is
printed is the clock's median with a progress callback, and the processor's time for a step without.
"""

import argparse
import statistics
import time
from collections.abc import Mapping

import torch

from lcexport.configs.presets import Preset, preset_from
from lcexport.engines import TensorSpec
from lcexport.engines.eager import EagerEngine
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.sampler import sample
from lcexport.runtime.schedule import schedule
from lcexport.runtime.text import Text

STEPS = 100
GUIDANCE = 4.0
CAPTION_CHANNELS = 4096


def idle_engine(preset: Preset, batch: int) -> EagerEngine:
    """An engine that answers at once: a constant velocity."""
    latents = preset.latent_shape
    inputs = (
        TensorSpec("hidden_states", (batch, *latents), torch.float32),
        TensorSpec(
            "encoder_hidden_states", (batch, 1, preset.text_tokens, CAPTION_CHANNELS), torch.float32
        ),
        TensorSpec("timestep", (batch, latents[1]), torch.float32),
        TensorSpec("encoder_attention_mask", (batch, preset.text_tokens), torch.bool),
    )
    output = TensorSpec("velocity", (batch, *latents), torch.float32)
    answer = torch.full(output.shape, 0.1)

    def forward(given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [answer]

    return EagerEngine(forward, inputs, (output,), torch.device("cpu"))


def measure(preset: Preset, batch: int) -> tuple[float, float]:
    """Median seconds of a step, and the processor's seconds."""
    embeds = torch.randn(1, 1, preset.text_tokens, CAPTION_CHANNELS)
    text = Text(embeds, torch.ones(1, preset.text_tokens, dtype=torch.bool))
    noise, seconds = torch.randn(1, *preset.latent_shape), []
    with idle_engine(preset, batch) as engine:
        denoiser = Denoiser(engine, text, text, GUIDANCE)
        sample(denoiser.velocity, noise, schedule(STEPS), lambda e: seconds.append(e.seconds))
        begin = time.process_time()
        sample(denoiser.velocity, noise, schedule(STEPS))
        spent = time.process_time() - begin
    return statistics.median(seconds), spent / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--res", default="bench,480p", help="presets, separated by commas")
    torch.set_num_threads(1)
    for name in parser.parse_args().res.split(","):
        preset = preset_from(name)
        for batch in (1, 2):
            clock, spent = measure(preset, batch)
            print(
                f"{name}, batch {batch}: {clock * 1e3:.2f} ms a step, {spent * 1e3:.2f} ms of the "
                "processor"
            )


if __name__ == "__main__":
    main()
