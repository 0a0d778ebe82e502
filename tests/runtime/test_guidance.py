"""CFG-zero against the original's scale function."""

import pytest
import torch

from lcexport.runtime.guidance import cfg_zero, optimal_scale, plain_cfg


@pytest.mark.parametrize("batch", ["b1", "b2"])
def test_golden(golden, batch):
    case = golden("cfg_zero")
    cond, uncond = case[f"{batch}.cond"], case[f"{batch}.uncond"]
    scale_B = optimal_scale(cond, uncond)
    torch.testing.assert_close(scale_B, case[f"{batch}.st_star"][:, 0], rtol=0, atol=1e-6)
    result = cfg_zero(cond, uncond, 4.0)
    torch.testing.assert_close(result, case[f"{batch}.result_g4"], rtol=0, atol=5e-6)


def test_the_scale_is_not_clamped(golden):
    case = golden("cfg_zero")
    small, zero = case["edge.uncond_small"], torch.zeros_like(case["edge.cond"])
    expected = case["edge.st_star_small_neg"][:, 0]
    torch.testing.assert_close(optimal_scale(case["edge.cond"], small), expected)
    assert optimal_scale(case["edge.cond"], zero).tolist() == [0.0]


def test_each_sample_has_its_own_scale():
    cond, uncond = torch.randn(2, 2, 16, 2, 4, 6)
    both = cfg_zero(cond, uncond, 4.0)
    for i in range(2):
        alone = cfg_zero(cond[i : i + 1], uncond[i : i + 1], 4.0)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_low_precision_is_widened():
    cond, uncond = torch.randn(2, 1, 16, 2, 4, 6, dtype=torch.bfloat16)
    result = cfg_zero(cond, uncond, 4.0)
    assert result.dtype == torch.float32
    assert torch.equal(result, cfg_zero(cond.float(), uncond.float(), 4.0))


def test_plain_cfg():
    cond, uncond = torch.full((1, 2), 3.0), torch.full((1, 2), 1.0)
    assert plain_cfg(cond, uncond, 4.0).tolist() == [[9.0, 9.0]]
    assert torch.equal(plain_cfg(cond, uncond, 1.0), cond)
