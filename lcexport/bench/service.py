"""A fresh process that serves requests as a service would: load, first step, request after request.

It has one backend in it and nothing else, so that its peak of memory is that backend's. It is
started with one argument, a JSON object of `serve`'s arguments, and prints another: its figures, or
the error that kept it from them.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lcexport.configs.errors import LcexportError
from lcexport.configs.tasks import Task
from lcexport.engines.host import peak_rss_bytes
from lcexport.runtime import CancelToken, Pipeline, StepEvent, load
from lcexport.runtime.conditioning import Pixels
from lcexport.timing import seconds_of, summary

PROMPT = "a paper boat drifts down a rainy street at night"
SEED = 11

OnStep = Callable[[StepEvent], object]


def serve(
    folder: str,
    resolution: str,
    task: Task,
    backend: str,
    device: str,
    steps: int,
    repeats: int,
    requests: int,
    started: float,
    library_components: bool = False,
) -> dict[str, object]:
    """Figures of one contestant in seconds and bytes.

    Args:
        backend: of `lcexport.engines.BACKENDS`, or `compile`.
        repeats: how often each stage is run.
        requests: whole ones, back to back, after the first.
        started: `time.monotonic()`, one clock for all processes, before this one was.
        library_components: text encoder and VAE by the library, whatever was compiled.
    """
    where = torch.device(device)
    free_at_start = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0
    begin = time.monotonic()
    texts = prompts()
    with opened(folder, resolution, task, backend, device, not library_components) as pipe:
        loaded = time.monotonic()
        stepped: list[float] = []
        request(pipe, next(texts), task, steps, lambda event: stepped.append(time.monotonic()))
        seconds = [
            seconds_of(lambda: request(pipe, next(texts), task, steps, None), where)
            for _ in range(requests)
        ]
        got: dict[str, object] = {
            "load_seconds": loaded - begin,
            "cold_start_seconds": stepped[0] - started,
            **{name: summary(of) for name, of in stages(pipe, texts, task, repeats).items()},
        }
        if seconds:
            got["requests"] = summary(seconds)
            got["requests_per_hour"] = 3600 * len(seconds) / sum(seconds)
        if where.type == "cuda":
            # torch keeps what it once had: what is gone now is what was needed at the most
            got["device_peak_bytes"] = free_at_start - torch.cuda.mem_get_info(where)[0]
        got["host_peak_bytes"] = peak_rss_bytes()
    return got


def opened(
    folder: str, resolution: str, task: Task, backend: str, device: str, compiled_components: bool
) -> Pipeline:
    """The pipeline, its engine for the task open."""
    if backend != "compile":
        return load(
            folder, resolution, backend, device, tasks=[task],
            compiled_components=compiled_components,
        )  # fmt: skip
    from lcexport.bench.compiled import compiled

    pipe = load(folder, resolution, "eager", device, tasks=[task])
    graph = pipe.graph(task)
    pipe.components.adopt(graph, compiled(pipe.components.engine(graph), graph))
    return pipe


def prompts() -> Iterator[str]:
    """Another one each time: a pipeline keeps what it encoded, and a repeat would find it there."""
    return (f"{PROMPT} {number}" for number in itertools.count())


def request(pipe: Pipeline, prompt: str, task: Task, steps: int, on_step: OnStep | None) -> None:
    """One video of `steps` steps, from prompt to frames."""
    job = pipe.graph(task).job
    shared: dict[str, Any] = {"seed": SEED, "steps": steps, "on_step": on_step}
    before = pixels(job.cond_frames, job.height, job.width) if job.cond_frames else None
    if before is not None and job.task.endswith("i2v"):
        shared["image"], before = before[0], None
    if job.refinement:
        video = pixels(job.preset.frames, job.preset.height, job.preset.width)
        spatial = job.task.startswith("spatial")
        # A threshold of 1 cuts nothing off the schedule.
        pipe.refine(video, prompt, cond_video=before, spatial=spatial, t_thresh=1.0, **shared)
    else:
        cache = job.task != "vc-uncached"
        pipe.generate(prompt, task=task, video=before, cache=cache, enhance_hf=False, **shared)


def pixels(frames: int, height: int, width: int) -> Pixels:
    """Noise, uint8 [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(SEED)
    size = (frames, height, width, 3)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy()


def stages(
    pipe: Pipeline, texts: Iterator[str], task: Task, repeats: int
) -> dict[str, list[float]]:
    """Seconds of encoding one of `texts`, of a continuation's cache, and of decoding one video."""
    job, parts, device = pipe.graph(task).job, pipe.components, pipe.components.device
    generator = torch.Generator().manual_seed(SEED)
    channels, frames, *size = job.latent_shape
    whole = torch.randn(1, channels, frames + job.cached_latents, *size, generator=generator)
    runs: dict[str, Callable[[], object]] = {
        "text": lambda: pipe.encode([next(texts)]),
        "decode": lambda: parts.decode(whole.to(device), CancelToken()),
    }
    if job.cached_latents:
        clean = whole[:, :, : job.cached_latents]
        runs["cache"] = lambda: pipe.make_cache(cond_latents=clean)
    with torch.no_grad():
        return {
            name: [seconds_of(run, device) for _ in range(repeats)] for name, run in runs.items()
        }


def main() -> None:
    """The process."""
    try:
        got = serve(**json.loads(sys.argv[1]))
    except LcexportError as error:
        # here, so that what is measured has no part of it in its memory and its start
        from lcexport.engines.trt.worker import value_from

        got = {"error": value_from(error)}
    sys.stdout.write(json.dumps(got) + "\n")


if __name__ == "__main__":
    main()
