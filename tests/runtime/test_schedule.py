"""Schedules and the Euler step, bit-equal to the original scheduler."""

import pytest
import torch

from lcexport.configs.errors import UsageError
from lcexport.runtime.schedule import enhance_hf_schedule, euler_step, refine_schedule, schedule


def assert_schedule(case, name, result):
    assert torch.equal(result.timesteps, case[f"{name}.timesteps"])
    assert torch.equal(result.sigmas, case[f"{name}.sigmas"])
    assert result.timesteps.dtype == result.sigmas.dtype == torch.float32
    assert result.steps == len(result.timesteps) == len(result.sigmas) - 1
    assert result.sigmas[-1] == 0


@pytest.mark.parametrize("shift", [12, 1])
@pytest.mark.parametrize("steps", [50, 20, 6, 1])
def test_standard(golden, shift, steps):
    assert_schedule(golden("scheduler"), f"shift{shift}.std{steps}", schedule(steps, shift))


@pytest.mark.parametrize("shift", [12, 1])
@pytest.mark.parametrize("steps", [16, 8, 50])
def test_distilled(golden, shift, steps):
    result = schedule(steps, shift, distill=True)
    assert_schedule(golden("scheduler"), f"shift{shift}.distill{steps}", result)


@pytest.mark.parametrize("shift", [12, 1])
@pytest.mark.parametrize("steps", [50, 20, 6])
@pytest.mark.parametrize("t_thresh", [0.5, 0.3])
def test_refinement(golden, shift, steps, t_thresh):
    result = refine_schedule(steps, t_thresh, shift)
    assert_schedule(golden("scheduler"), f"shift{shift}.refine{steps}_t{t_thresh}", result)


@pytest.mark.parametrize("shift", [12, 1])
@pytest.mark.parametrize("steps", [50, 20, 6])
def test_enhanced_high_frequencies(golden, shift, steps):
    result = enhance_hf_schedule(steps, shift)
    assert_schedule(golden("scheduler"), f"shift{shift}.enhance_hf{steps}", result)


def test_the_default_shift_is_12():
    assert torch.equal(schedule(50).sigmas, schedule(50, 12.0).sigmas)


def test_euler_steps_of_the_original_scheduler(golden):
    case = golden("scheduler")
    sigmas = schedule(16, distill=True).sigmas
    for i in range(16):
        # the case stores the network's output; the original negates it before its step
        x = euler_step(case[f"euler.x{i}"], case[f"euler.v{i}"], sigmas[i], sigmas[i + 1])
        assert torch.equal(x, case[f"euler.x{i + 1}"])


def test_a_bfloat16_sample_is_widened_first(golden):
    case, sigmas = golden("scheduler"), schedule(16, distill=True).sigmas
    velocity = -case["euler_bf16.model_output"]
    x = euler_step(case["euler_bf16.sample"], velocity, sigmas[0], sigmas[1])
    assert torch.equal(x, case["euler_bf16.prev"])


def test_the_chain_of_a_whole_sampling(golden):
    case = golden("denoise_tiny")
    plan = schedule(6)
    x = case["latents_init"]
    for i in range(6):
        velocity = -case[f"model_output_{i}"]  # stored after the original's negation
        x = euler_step(x, velocity, plan.sigmas[i], plan.sigmas[i + 1])
        torch.testing.assert_close(x, case[f"latents_after_{i}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(x, case["final"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range(steps):
    with pytest.raises(UsageError, match="number of steps"):
        schedule(steps)


def test_the_distilled_grid_has_fifty_values():
    with pytest.raises(UsageError, match=r"1\.\.50"):
        schedule(51, distill=True)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf")])
def test_shift_out_of_range(shift):
    for make in (schedule, enhance_hf_schedule):
        with pytest.raises(UsageError, match="shift"):
            make(6, shift)


@pytest.mark.parametrize("t_thresh", [0, -0.5, 1.5, float("nan")])
def test_threshold_out_of_range(t_thresh):
    with pytest.raises(UsageError, match="threshold"):
        refine_schedule(6, t_thresh)
