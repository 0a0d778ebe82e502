"""Clean frames as keys and values: the original's cache, and what the DiT makes of it."""

from copy import deepcopy
from unittest import mock

import pytest
import torch

from lcexport.compare import difference
from lcexport.configs.errors import UsageError

ATOL = 2e-5  # float32, one forward pass


@pytest.fixture(scope="module")
def case(golden):
    return golden("dit_tiny_vc_kvcache")


@pytest.fixture(scope="module")
def cache(dit, case):
    with torch.no_grad():
        return dit.cache(case["cond_latents"])


def cached(dit, case, cache):
    text, mask = case["encoder_hidden_states"], case["encoder_attention_mask"]
    return dit(case["noise_latents"], text, case["timestep"], mask, cache=cache)


def test_keys_and_values_of_every_layer(case, cache):
    assert len(cache) == 3
    for i, (k, v) in enumerate(cache):
        torch.testing.assert_close(k, case[f"kv.{i}.k"], rtol=0, atol=ATOL)
        torch.testing.assert_close(v, case[f"kv.{i}.v"], rtol=0, atol=ATOL)


def test_block_0_is_as_near_to_float64_as_the_originals(dit, case, cache):
    # Bit-equality depends on the processor: with AVX2 the original's own convolution, the first
    # operation of all, is 1.2e-6 from what it gave on the machine that made the golden data.
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        exact = deepcopy(dit).double().cache(case["cond_latents"].double())
    for name, ours, right in zip("kv", cache[0], exact[0], strict=True):
        golden_error = (case[f"kv.0.{name}"] - right).abs().max()
        assert golden_error > 0
        assert (ours - right).abs().max() < 2 * golden_error


def test_one_samples_cache_serves_both_branches(dit, case, cache):
    assert len(cache[0][0]) == 1
    assert len(case["noise_latents"]) == 2
    torch.testing.assert_close(cached(dit, case, cache), case["output"], rtol=0, atol=ATOL)


def test_the_cached_and_the_uncached_forward_agree(dit, case, cache):
    clean = case["cond_latents"].expand(2, -1, -1, -1, -1)
    whole = torch.cat([clean, case["noise_latents"]], dim=2)
    timestep = torch.cat([torch.zeros(2, 2), case["timestep"]], dim=1)
    text, mask = case["encoder_hidden_states"], case["encoder_attention_mask"]
    uncached = dit(whole, text, timestep, mask, num_cond_latents=2)
    torch.testing.assert_close(uncached, case["output_uncached_full"], rtol=0, atol=ATOL)
    torch.testing.assert_close(uncached[:, :, 2:], cached(dit, case, cache), rtol=0, atol=ATOL)


def test_the_cache_matters(dit, case, cache):
    other = [(k + 1, v) for k, v in cache]
    assert difference(cached(dit, case, other), case["output"]).max_abs > 100 * ATOL


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda cache: cache[:-1], id="another depth"),
        pytest.param(lambda cache: [(k[:, :1], v[:, :1]) for k, v in cache], id="other heads"),
        pytest.param(lambda cache: [(k[:, :, :-1], v[:, :, :-1]) for k, v in cache], id="grid"),
        pytest.param(lambda cache: [(k[..., :64], v[..., :64]) for k, v in cache], id="head size"),
        pytest.param(lambda cache: [(k, v[:, :, :24]) for k, v in cache], id="keys without values"),
        pytest.param(lambda cache: [(k.expand(3, -1, -1, -1),) * 2 for k, _ in cache], id="batch"),
        pytest.param(lambda cache: [], id="empty"),
    ],
)
def test_a_cache_of_another_model_or_resolution_is_refused(dit, case, cache, spoil):
    with pytest.raises(UsageError, match="of another model or resolution"):
        cached(dit, case, spoil(cache))


def test_clean_frames_are_cached_or_in_front_not_both(dit, case, cache):
    text, mask = case["encoder_hidden_states"], case["encoder_attention_mask"]
    with pytest.raises(UsageError, match="not in both"):
        dit(case["noise_latents"], text, case["timestep"], mask, num_cond_latents=1, cache=cache)
