"""What a step does beside the engine's run: no allocation, no waiting for the device."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcexport.configs.errors import VerificationError
from lcexport.engines import TensorSpec
from lcexport.runtime import sampler
from lcexport.runtime.cache import KeyValueCache
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.sampler import sample
from lcexport.runtime.schedule import schedule
from lcexport.runtime.text import Text

STEPS = 200
LATENTS = (16, 3, 8, 12)


class Watch(TorchDispatchMode):
    """Counts tensors that come with memory of their own, and looks at a tensor's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0
        self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = {storage(t) for t in tree_leaves(made) if isinstance(t, torch.Tensor)} - given
        self.allocated += len(new)
        self.read += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten._to_copy.default,
        )
        return made


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Halves:
    """An engine that allocates nothing: half the latents, and the timestep and text on top."""

    backend = "halves"
    device = torch.device("cpu")

    def __init__(self, batch: int, clean: int = 0, cached: bool = False) -> None:
        channels, frames, *size = LATENTS
        shapes = {
            "hidden_states": (channels, frames + clean, *size),
            "encoder_hidden_states": (1, 12, 64),
            "timestep": (frames + clean,),
            **({"key.0": (2, 6, 4), "value.0": (2, 6, 4)} if cached else {}),
        }
        mask = TensorSpec("encoder_attention_mask", (batch, 12), torch.bool)
        floats = (TensorSpec(n, (batch, *shape), torch.float32) for n, shape in shapes.items())
        self.inputs = (*floats, mask)
        output = TensorSpec("velocity", (batch, *shapes["hidden_states"]), torch.float32)
        self.outputs = (output,)

    def run(self, inputs, outputs):
        made = torch.mul(inputs["hidden_states"], 0.5, out=outputs["velocity"])
        made.add_(inputs["timestep"][:, None, :, None, None], alpha=1e-4)
        made.add_(inputs["encoder_hidden_states"][:, :, :1, :1, None], alpha=1e-2)


def text(samples: int) -> Text:
    return Text(torch.randn(samples, 1, 12, 64), torch.ones(samples, 12, dtype=torch.bool))


def watched(steps: int, engine: Any, samples: int, wrap=lambda v: v, **options: Any) -> Watch:
    """A guided sampling of so many steps under the watch; its denoiser is made before."""
    denoiser = Denoiser(engine, text(samples), text(samples), 4.0, **options)
    noise = torch.randn(samples, *LATENTS)
    with Watch() as watch:
        sample(wrap(denoiser.velocity), noise, schedule(steps))
    return watch


@pytest.mark.parametrize(("engine_batch", "samples"), [(1, 1), (2, 1), (3, 2)])
def test_two_hundred_steps_allocate_what_two_do(engine_batch, samples):
    engine = Halves(engine_batch)
    few, many = (watched(steps, engine, samples).allocated for steps in (2, STEPS))
    assert few == many > 0


@pytest.mark.parametrize("engine_batch", [1, 2])
def test_nor_do_clean_frames_or_a_cache_allocate(engine_batch):
    clean = torch.randn(1, 16, 1, *LATENTS[2:])
    past = {name: torch.randn(1, 2, 6, 4) for name in ("key.0", "value.0")}
    cache = KeyValueCache(torch.empty(0), (past,), ("", ""))
    for engine, options in (
        (Halves(engine_batch, clean=1), {"clean": clean}),
        (Halves(engine_batch, cached=True), {"cache": cache}),
    ):
        few, many = (watched(n, engine, 1, **options).allocated for n in (2, STEPS))
        assert few == many > 0


def test_the_watch_sees_one_tensor_a_step():
    def careless(velocity):
        return lambda latents, timestep: velocity(latents, timestep) * 1.0

    few, many = (watched(steps, Halves(2), 1, careless).allocated for steps in (2, STEPS))
    assert many - few == STEPS - 2


def test_no_step_looks_at_the_devices_numbers(monkeypatch):
    monkeypatch.setattr(sampler, "reading_is_free", lambda device: False)
    few, many = (watched(steps, Halves(1), 1).read for steps in (2, STEPS))
    assert few == many


def test_on_a_device_the_first_bad_step_is_named_after_the_last(monkeypatch):
    monkeypatch.setattr(sampler, "reading_is_free", lambda device: False)
    called: list[float] = []

    def breaks_in_the_third(latents, timestep):
        called.append(timestep[0].item())
        return latents * (float("nan") if len(called) == 3 else 1.0)

    with pytest.raises(VerificationError, match=r"step 3 of 5 .* nan"):
        sample(breaks_in_the_third, torch.randn(1, *LATENTS), schedule(5))
    assert len(called) == 5
    called.clear()
    with pytest.raises(VerificationError, match="step 3 of 5"):
        sample(breaks_in_the_third, torch.randn(1, *LATENTS), schedule(5), lambda event: None)
    assert len(called) == 3


def test_the_noise_stays_the_callers_and_events_stay_what_they_were():
    noise = torch.randn(1, *LATENTS)
    before, events = noise.clone(), []
    final = sample(lambda x, t: x, noise, schedule(3), events.append)
    assert torch.equal(noise, before)
    assert torch.equal(events[-1].latents, final)
    assert not torch.equal(events[0].latents, events[1].latents)


@pytest.mark.parametrize(("engine_batch", "copies"), [(1, 2 * STEPS), (2, 2)])
def test_text_is_copied_again_only_where_a_slot_gets_another_row(engine_batch, copies):
    engine: Any = Halves(engine_batch)
    denoiser = Denoiser(engine, text(1), text(1), 4.0)
    copied: list[int] = []
    there = denoiser._inputs["encoder_hidden_states"].untyped_storage().data_ptr()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                copied.append(args[0].untyped_storage().data_ptr() == there)
            return func(*args, **(kwargs or {}))

    with Copies():
        sample(denoiser.velocity, torch.randn(1, *LATENTS), schedule(STEPS))
    assert sum(copied) == copies
