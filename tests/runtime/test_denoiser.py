"""Rows, branches and engine batches: the same velocity whatever the engine's batch."""

import pytest
import torch

from lcexport.configs.errors import Cancelled, UsageError
from lcexport.runtime import CancelToken
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.guidance import cfg_zero
from lcexport.runtime.text import Text


def make_text(batch: int, seed: int) -> Text:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(12) < torch.randint(1, 12, (batch, 1), generator=generator)
    return Text(torch.randn(batch, 1, 12, 64, generator=generator), mask)


def run_once(engine, text, latents, timestep):
    """The fake's velocity for whole batches, past the denoiser."""
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": text.embeds,
        "timestep": timestep,
        "encoder_attention_mask": text.mask,
    }
    outputs = {"velocity": torch.empty_like(latents)}
    engine.run(inputs, outputs)
    return outputs["velocity"]


@pytest.mark.parametrize("engine_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2])
def test_guided_velocity(fake_engine, engine_batch, samples):
    latents, timestep = torch.randn(samples, 16, 3, 8, 12), torch.full((samples,), 437.5)
    positive, negative = make_text(samples, 1), make_text(samples, 2)
    engine = fake_engine(engine_batch)
    denoiser = Denoiser(engine, positive, negative, scale=4.0)
    result = denoiser.velocity(latents, timestep)
    assert len(engine.calls) == -(-2 * samples // engine_batch)
    whole, times = fake_engine(samples), timestep[:, None].expand(-1, 3).contiguous()
    cond, uncond = (run_once(whole, text, latents, times) for text in (positive, negative))
    torch.testing.assert_close(result, cfg_zero(cond, uncond, 4.0), rtol=0, atol=1e-5)


def test_the_order_is_negative_then_positive(fake_engine):
    engine, positive, negative = fake_engine(2), make_text(1, 1), make_text(1, 2)
    denoiser = Denoiser(engine, positive, negative, scale=4.0)
    denoiser.velocity(torch.randn(1, 16, 3, 8, 12), torch.tensor([1000.0]))
    expected = torch.cat([negative.embeds, positive.embeds])
    assert torch.equal(engine.calls[0]["encoder_hidden_states"], expected)
    expected = torch.cat([negative.mask, positive.mask])
    assert torch.equal(engine.calls[0]["encoder_attention_mask"], expected)


@pytest.mark.parametrize(("engine_batch", "calls"), [(1, 2), (2, 1), (3, 1)])
def test_scale_one_computes_one_branch(fake_engine, engine_batch, calls):
    latents, engine = torch.randn(2, 16, 3, 8, 12), fake_engine(engine_batch)
    positive = make_text(2, 1)
    denoiser = Denoiser(engine, positive, make_text(2, 2), scale=1.0)
    result = denoiser.velocity(latents, torch.full((2,), 500.0))
    assert len(engine.calls) == calls
    expected = run_once(fake_engine(2), positive, latents, torch.full((2, 3), 500.0))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_frames_may_have_their_own_timesteps(fake_engine):
    engine, timestep = fake_engine(1), torch.tensor([[0.0, 900.0, 900.0]])
    Denoiser(engine, make_text(1, 1)).velocity(torch.randn(1, 16, 3, 8, 12), timestep)
    assert torch.equal(engine.calls[0]["timestep"], timestep)


def test_buffers_are_reused(fake_engine):
    engine = fake_engine(1)
    denoiser = Denoiser(engine, make_text(2, 1), make_text(2, 2), scale=2.0)
    for timestep in (1000.0, 500.0):
        denoiser.velocity(torch.randn(2, 16, 3, 8, 12), torch.full((2,), timestep))
    assert len(engine.calls) == 8
    assert len(engine.addresses) == 1


def test_cancel_stops_between_two_calls_of_one_step(fake_engine):
    token, engine = CancelToken(), fake_engine(1)
    run = engine.run

    def run_then_cancel(inputs, outputs):
        run(inputs, outputs)
        token.cancel()

    engine.run = run_then_cancel
    denoiser = Denoiser(engine, make_text(1, 1), make_text(1, 2), scale=2.0, cancel=token)
    with pytest.raises(Cancelled):
        denoiser.velocity(torch.randn(1, 16, 3, 8, 12), torch.tensor([1000.0]))
    assert len(engine.calls) == 1


def test_guidance_needs_a_negative_prompt(fake_engine):
    with pytest.raises(UsageError, match="negative prompt"):
        Denoiser(fake_engine(1), make_text(1, 1), scale=4.0)


def test_latents_that_do_not_fit(fake_engine):
    denoiser = Denoiser(fake_engine(1), make_text(1, 1))
    for shape in ((1, 16, 3, 8, 10), (2, 16, 3, 8, 12), (1, 1, 1, 1, 1)):
        with pytest.raises(UsageError, match="latents do not fit"):
            denoiser.velocity(torch.randn(shape), torch.tensor([1000.0]))


@pytest.mark.parametrize(("embeds", "mask"), [((1, 1, 12, 32), (1, 12)), ((1, 1, 12, 64), (1, 8))])
def test_text_that_does_not_fit(fake_engine, embeds, mask):
    with pytest.raises(UsageError, match="text does not fit"):
        Denoiser(fake_engine(1), Text(torch.zeros(embeds), torch.ones(mask, dtype=torch.bool)))
