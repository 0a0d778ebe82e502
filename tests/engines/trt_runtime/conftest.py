"""The TensorRT double, plans made of the golden DiT's graph, and engines on them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from trt_plans import load_double, write_plans

from lcexport.engines.trt.memory import Workspace
from lcexport.engines.trt.product import Product, version_from
from lcexport.engines.trt.reader import PlanFile
from lcexport.engines.trt.runtime import RunOptions, TrtEngine


@pytest.fixture
def double() -> Any:
    """The double, with no failure injected and no history."""
    module = load_double()
    module.reset()
    yield module
    module.reset()


@pytest.fixture
def product(double) -> Product:
    return Product("tensorrt", double, version_from(double.__version__))


@pytest.fixture
def ops(double) -> Any:
    return double.HostOps()


@pytest.fixture
def workspace(ops) -> Workspace:
    return Workspace(ops)


@pytest.fixture(scope="session")
def make_plans(make_graph, tmp_path_factory) -> Callable[..., list[PlanFile]]:
    """`make_plans(3, "bf16", stripped=True)`: plans of the golden DiT. Read only."""

    @cache
    def make(segments: int = 1, bulk: str = "fp32", **settings: Any) -> list[PlanFile]:
        return write_plans(make_graph(bulk), tmp_path_factory.mktemp("plans"), segments, **settings)

    return make


@pytest.fixture
def open_engine(product, workspace, make_plans):
    """`open_engine(3, cuda_graph=True)`; closed when the test ends."""
    opened: list[TrtEngine] = []

    def make(segments: int = 1, bulk: str = "fp32", *, plan: dict | None = None, **options: Any):
        plans = make_plans(segments, bulk, **(plan or {}))
        opened.append(TrtEngine(product, plans, workspace, RunOptions(**options)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :7] = mask[1, :2] = True
    return {
        "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 1, 10, 64, generator=generator),
        "timestep": torch.full((2, 3), 752.0),
        "encoder_attention_mask": mask,
    }


@pytest.fixture
def output() -> torch.Tensor:
    return torch.full((2, 16, 3, 8, 12), torch.nan)


@pytest.fixture
def velocity(inputs) -> Callable[[Any], torch.Tensor]:
    """`velocity(engine)` runs it once on `inputs`, into a tensor of its own."""

    def run(engine: Any) -> torch.Tensor:
        result = torch.full((2, 16, 3, 8, 12), torch.nan)
        engine.run(inputs, {"velocity": result})
        return result

    return run
