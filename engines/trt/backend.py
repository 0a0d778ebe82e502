"""The `tensorrt` and `tensorrt-rtx` backends: a bundle's plans, opened and ready to run."""

import torch

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines.bundle import Bundle, EngineRecord
from lcexport.engines.trt.memory import CudaOps, Workspace
from lcexport.engines.trt.product import open_product
from lcexport.engines.trt.reader import BuiltFor, PlanFile, read_here
from lcexport.engines.trt.runtime import TrtEngine, open_plans


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`.

    Compiling for RTX needs no GPU, so `cpu` is allowed here; running an engine asks for one.
    """
    if precision != "bf16":
        raise IncompatibleError(
            f"{backend} engines are bf16: fused attention has no float32 kernel",
            got=f"precision {precision}",
            do="Build with --precision bf16; what is sensitive stays in float32.",
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device for {backend}", got=repr(str(device)), wanted="cpu, cuda")
    open_product(backend)


def open_engine(backend: str, bundle: Bundle, resolution: str, device: str = "cuda") -> TrtEngine:
    """Open the plans of one resolution on a GPU, each file's SHA-256 checked as it is read.

    Raises:
        UsageError: the bundle has no such engine.
        IncompatibleError: no GPU, or the plans were built for something else; says the command
            that rebuilds.
    """
    record = engine_record(bundle, backend, resolution)
    where = torch.device(device)
    if where.type != "cuda":
        raise IncompatibleError(
            f"{backend} engines run on NVIDIA GPUs", got=f"device {device}", do="Use --device cuda."
        )
    product = open_product(backend)
    here = read_here(product, where)
    plans = [
        PlanFile(
            bundle.path(plan.file),
            bundle.manifest.files[plan.file].bytes,
            bundle.manifest.files[plan.file].sha256,
        )
        for plan in record.plans
    ]
    rebuild = (
        f"lcexport build --model CHECKPOINT --res {resolution} --precision bf16 "
        f"--backend {backend} -o NEW"
    )
    workspace = Workspace(CudaOps(where))
    return open_plans(product, plans, built_for(record), here, workspace, rebuild=rebuild)


def engine_record(bundle: Bundle, backend: str, resolution: str) -> EngineRecord:
    """The compiled engine's record; UsageError names what there is."""
    bundle.graph(resolution)
    compiled = bundle.manifest.engines.get(backend, {})
    if resolution not in compiled:
        raise UsageError(
            f"the bundle {bundle.folder} holds no {backend} engine for {resolution}",
            got=", ".join(compiled) or "none",
            do=f"Build one with --backend {backend}.",
        )
    return compiled[resolution]


def built_for(record: EngineRecord) -> BuiltFor:
    """What the plans need, as their reader wants to know it."""
    options = record.options
    return BuiltFor(
        product=record.product,
        version=record.version,
        platform=record.platform,
        compute_capabilities=record.compute_capabilities,
        gpu=record.gpu,
        driver=record.driver,
        hardware_compatibility=options["hardware_compatibility"],  # pyright: ignore[reportArgumentType]  # the schema of TrtOptions
        version_compatible=bool(options["version_compatible"]),
    )
