"""torch.compile of a bundle's DiT, as an engine."""

from typing import Any

import torch

from lcexport.configs.errors import IncompatibleError
from lcexport.eager import DitEngine
from lcexport.engines import Engine
from lcexport.engines.manifest import GraphRecord
from lcexport.golden import branch_inputs, golden_inputs, run_once

# A contestant's name, not a backend's. Inductor's files of one process would serve the next: one
# that starts cold is given an empty folder for them (`lcexport.bench.run.served`).
COMPILE = "compile"


def compiled(eager: Engine, graph: GraphRecord) -> DitEngine:
    """An engine over the DiT of `eager`, whose weights it shares, compiled by a first pass.

    Raises:
        IncompatibleError: torch.compile does not work here.
    """
    assert isinstance(eager, DitEngine)
    assert eager.dit is not None
    module: Any = torch.compile(eager.dit)
    engine = DitEngine(module, graph, eager.device, eager.source)
    try:
        run_once(engine, branch_inputs(golden_inputs(engine), "cond"))
    except Exception as error:  # no compiler, no Triton, a fault of its own: it has many types
        said = str(error).strip().splitlines() or [""]
        raise IncompatibleError(
            "torch.compile does not work here",
            got=f"{type(error).__name__}: {said[0]}",
            do="Install a C++ compiler and Python's headers (and Triton for a GPU), or leave "
            f"`{COMPILE}` out of --backend.",
        ) from error
    return engine
