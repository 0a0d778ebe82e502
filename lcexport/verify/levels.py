"""The five levels, from the files' hashes to whole videos. Each adds to the ones before it."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from lcexport import runtime
from lcexport.builder.components import component_errors
from lcexport.compare import COMPONENT_TOLERANCE, STEP_TOLERANCE, VIDEO_TOLERANCE, difference
from lcexport.configs.errors import IntegrityError
from lcexport.configs.tasks import Job
from lcexport.engines import open_engine
from lcexport.engines.aoti_components import open_component
from lcexport.engines.bundle import Bundle, check_file
from lcexport.engines.manifest import ComponentRecord
from lcexport.golden import against_golden, read_golden
from lcexport.runtime import StepEvent
from lcexport.verify.diagnostics import diagnose
from lcexport.verify.modules import check_modules
from lcexport.verify.report import Check, Level, compared

PROMPT = "a red circle moves left"
VIDEO_STEPS = 4
VIDEO_SEED = 42


def hash_level(bundle: Bundle) -> Iterator[Check]:
    """One row per file that is damaged, or one that says all are whole."""
    damaged = 0
    for name, record in bundle.manifest.files.items():
        try:
            check_file(bundle.folder / name, record, hashed=True)
        except IntegrityError as error:
            damaged += 1
            yield Check("hash", "", "", name, {}, f"as in the manifest: {error.what}", False)
    if not damaged:
        count = float(len(bundle.manifest.files))
        yield Check("hash", "", "", "all files", {"files": count}, "SHA-256 as manifest", True)


def load_level(bundle: Bundle, resolution: str, backend: str, device: str) -> Check:
    """Open the engine and compare its inputs and outputs with the manifest's."""
    record = bundle.graph(resolution)
    recorded = [(t.name, t.shape, t.dtype) for t in (*record.inputs, *record.outputs)]
    with open_engine(backend, bundle, resolution, device) as engine:
        specs = (*engine.inputs, *engine.outputs)
        found = [(s.name, s.shape, str(s.dtype).removeprefix("torch.")) for s in specs]
    got = {"tensors": float(len(found))}
    return Check(
        "load", resolution, backend, "inputs and outputs", got, "as manifest", found == recorded
    )


def component_level(
    bundle: Bundle, record: ComponentRecord, level: Level, device: str
) -> Iterator[Check]:
    """Open a compiled component; at the level of steps, hold it against the library's again."""
    name, backend = record.component.name, record.product
    if level == "load":
        packages = open_component(bundle, record, torch.device(device))
        for package in packages:
            package.close()
        got = {"packages": float(len(packages))}
        yield Check("load", name, backend, "packages", got, "all load", True)
        return
    tolerance = COMPONENT_TOLERANCE[bundle.manifest.precision]
    with closing(component_errors(bundle, record, device)) as measured:
        for part, found in measured:
            yield compared("step", name, backend, part, found, tolerance)


def module_level(bundle: Bundle, resolution: str) -> Iterator[Check]:
    """Every call of the graph against its torch module."""
    yield from check_modules(bundle, resolution, read_golden(bundle, resolution))


def step_level(bundle: Bundle, resolution: str, backend: str, device: str) -> Iterator[Check]:
    """One forward pass per branch against eager's stored outputs, then the six diagnostics.

    A graph that makes a key/value cache has no velocity to diagnose.
    """
    golden = read_golden(bundle, resolution)
    tolerance = STEP_TOLERANCE[bundle.manifest.precision]
    with open_engine(backend, bundle, resolution, device) as engine:
        made = {}
        for name, found, wanted in against_golden(engine, golden):
            made[name] = found
            error = difference(found, wanted)
            yield compared("step", resolution, backend, name, error, tolerance)
        if "velocity uncond" in made:
            velocities = made["velocity cond"], made["velocity uncond"]
            yield from diagnose(engine, golden, *velocities, resolution)


def video_level(
    bundle: Bundle, name: str, backends: tuple[str, ...], device: str
) -> Iterator[Check]:
    """A short generation by each backend against eager's: latents step by step, then frames."""
    job = bundle.graph(name).job
    if job.part == "cache":
        why = f"not checked here: the continuation that {job.preset.name}.{job.task} makes uses it"
        yield Check("video", name, "", "video", {}, why, None)
        return
    tolerance = VIDEO_TOLERANCE[bundle.manifest.precision]
    others = [backend for backend in backends if backend != "eager"]
    if not others:
        why = "not checked: eager is what the others are compared with"
        yield Check("video", name, "eager", "video", {}, why, None)
        return
    wanted = short_video(bundle, job, "eager", device)
    for backend in others:
        found = short_video(bundle, job, backend, device)
        for row, tensor in found.items():
            error = difference(tensor, wanted[row])
            yield compared("video", name, backend, row, error, tolerance)


def short_video(bundle: Bundle, job: Job, backend: str, device: str) -> dict[str, torch.Tensor]:
    """Latents after each step and the decoded frames of one prompt and seed."""
    tensors: dict[str, torch.Tensor] = {}

    def keep(event: StepEvent) -> None:
        tensors[f"latents after step {event.step}"] = event.latents.cpu().clone()

    frames, preset = job.cond_frames, job.preset
    options: dict[str, Any] = {"seed": VIDEO_SEED, "steps": VIDEO_STEPS, "on_step": keep}
    with runtime.load(bundle.folder, preset.name, backend, device, tasks=(job.task,)) as pipe:
        if job.refinement is not None:
            if job.task.endswith("-i2v"):
                options["image"] = clip(1, job.height, job.width)[0]
            elif frames:
                options["cond_video"] = clip(frames, job.height, job.width)
            options["spatial"] = job.refinement.spatial_only
            video = pipe.refine(clip(preset.frames, preset.height, preset.width), **options)
        else:
            if job.task == "i2v":
                options["image"] = clip(1, job.height, job.width)[0]
            elif frames:
                options |= {"video": clip(frames, job.height, job.width), "task": job.task}
            video = pipe.generate(PROMPT, **options)
    tensors["frames"] = video.frames
    return tensors


def clip(frames: int, height: int, width: int) -> np.ndarray:
    """Given frames uint8 [F, H, W, 3]: three ramps, of which one moves."""
    f, h, w = np.ogrid[:frames, :height, :width]
    channels = np.broadcast_arrays(4 * h + 0 * (f + w), 4 * w + 0 * (f + h), 4 * (w + h) + 8 * f)
    return np.stack(channels, axis=-1).astype(np.uint8)
