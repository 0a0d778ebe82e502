"""The kernel of block-sparse attention that TensorRT's plans may have in place of operators.

`--trt sparse_kernel=plugin` asks for it. Triton compiles it here, to PTX; the process that compiles
a plan registers it before it parses. The plan is then to hold the PTX (so the AOT tutorial of
Torch-TensorRT says; not tried): whoever runs it should need neither Triton nor the plugin.
"""

import importlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from lcexport.builder.options import BuildOptions
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job
from lcexport.dit.sparse import job_sparsity
from lcexport.engines.manifest import DIT_CONFIG
from lcexport.engines.trt.product import ProductName, open_product
from lcexport.engines.trt.reader import read_here
from lcexport.engines.trt.sparse_plugin import Kernel, plugin_module


def require_sparse_kernel(backend: ProductName, options: BuildOptions, jobs: Iterable[Job]) -> None:
    """Refuse a plugin that cannot be made, or that nothing would use, before anything is written.

    Raises:
        UsageError: a graph has no block-sparse attention.
        IncompatibleError: the product has no ahead-of-time plugins, or Triton is missing.
    """
    if options.trt.sparse_kernel != "plugin":
        return
    if dense := [job.name for job in jobs if not job.sparse]:
        raise UsageError(
            "sparse_kernel=plugin is for block-sparse attention, and these graphs have none",
            got=", ".join(dense),
            do="Leave it out, or build refinement's graphs alone, without --dense.",
        )
    plugin_module(open_product(backend))
    triton_kernels()


def sparse_kernel(
    folder: Path, backend: ProductName, job: Job, options: BuildOptions
) -> Kernel | None:
    """The kernel for a graph's chunks and the GPU at hand; None where operators were asked for."""
    if options.trt.sparse_kernel != "plugin":
        return None
    config = DiTConfig.from_json(folder / DIT_CONFIG)
    sparsity = job_sparsity(config, job)
    assert sparsity is not None, "require_sparse_kernel refuses graphs without"
    here = read_here(open_product(backend), torch.device(options.device))
    return triton_kernels().compile_kernel(
        torch.bfloat16,  # what a plan's attention computes in
        math.prod(sparsity.chunk_q),
        math.prod(sparsity.chunk_k),
        config.head_dim,
        int(here.compute_capability.removeprefix("sm")),
    )


def triton_kernels():
    """The module that needs Triton. IncompatibleError where it is missing."""
    return importlib.import_module("lcexport.dit.sparse_triton")
