"""Differences between tensors, and the bounds on them."""

import math

import pytest
import torch

from lcexport.compare import STEP_TOLERANCE, VIDEO_TOLERANCE, Tolerance, difference


def test_a_difference_counted_by_hand():
    found = difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    assert found.max_abs == 1
    assert found.mean_abs == 0.5
    assert found.relative_l2 == pytest.approx(1 / math.sqrt(18))
    assert found.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert found.as_dict().keys() == {"max_abs", "mean_abs", "relative_l2", "cosine"}


def test_equal_tensors_do_not_differ():
    tensor = torch.randn(2, 3, 4)
    found = difference(tensor, tensor.clone())
    assert (found.max_abs, found.mean_abs, found.relative_l2) == (0, 0, 0)
    assert found.cosine == pytest.approx(1)


def test_dtypes_may_differ_and_shapes_may_not():
    tensor = torch.tensor([1.0, 2.0, 4.0])
    assert difference(tensor.bfloat16(), tensor).max_abs == 0
    with pytest.raises(ValueError, match=r"\[3\] and \[1, 3\]"):
        difference(tensor, tensor[None])


def test_comparing_with_zeros_is_finite():
    assert math.isfinite(difference(torch.zeros(3), torch.zeros(3)).relative_l2)
    assert difference(torch.ones(3), torch.zeros(3)).relative_l2 > 1e30


def test_a_tolerance_bounds_both_ways():
    tolerance = Tolerance(relative_l2=0.1, cosine=0.9)
    base = torch.tensor([1.0, 0.0])
    assert tolerance.holds(difference(base * 1.09, base))
    assert not tolerance.holds(difference(base * 1.11, base))
    assert not tolerance.holds(difference(-base, base))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_holds_for_numbers_that_are_not_finite(bad):
    found = difference(torch.tensor([1.0, bad]), torch.ones(2))
    assert not Tolerance(relative_l2=math.inf, cosine=-1).holds(found)


def test_sampling_is_given_more_room_than_a_step():
    for precision in ("fp32", "bf16"):
        step, video = STEP_TOLERANCE[precision], VIDEO_TOLERANCE[precision]
        assert step.relative_l2 < video.relative_l2
        assert step.cosine > video.cosine
