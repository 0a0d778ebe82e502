"""Fixtures: the golden DiT in float32 and in bfloat16, with and without zeroed padding."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lcexport.dit import LongCatDiT, dit_from_tensors, load_dit


@pytest.fixture(scope="session")
def make_dit_model(dit_folder: Path) -> Callable[..., LongCatDiT]:
    """`make_dit_model(torch.bfloat16, zero_pad=False)`: the golden DiT, loaded once each."""

    @cache
    def make(dtype: torch.dtype = torch.float32, *, zero_pad: bool = True) -> LongCatDiT:
        dit = load_dit(dit_folder, dtype)
        config = dit.config.model_copy(update={"text_tokens_zero_pad": zero_pad})
        return dit_from_tensors(config, dit.state_dict())

    return make


@pytest.fixture(scope="session")
def dit(make_dit_model: Callable[..., LongCatDiT]) -> LongCatDiT:
    """The golden DiT in float32."""
    return make_dit_model()
