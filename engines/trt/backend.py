"""The `tensorrt` and `tensorrt-rtx` backends: a bundle's plans, opened and ready to run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines import Engine
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import WEIGHTS, CallRecord, EngineRecord
from lcexport.engines.trt.memory import CudaOps, Workspace, missing_gpu
from lcexport.engines.trt.options import bf16_targets, refuse_tf32_override
from lcexport.engines.trt.product import Product, open_product
from lcexport.engines.trt.reader import BuiltFor, Here, PlanFile, check_target, read_here
from lcexport.engines.trt.rebuild import rebuild_command
from lcexport.engines.trt.runtime import RunOptions, TrtEngine
from lcexport.engines.trt.steps import Call
from lcexport.engines.weights import SharedWeights, map_weights, shared_weights


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`.

    Compiling for RTX needs no GPU, so `cpu` is allowed there; running an engine asks for one.
    """
    if precision != "bf16":
        raise IncompatibleError(
            f"{backend} engines are bf16: RTX 1.7 has no fused attention in float32, and with "
            "TensorRT none was tried",
            got=f"precision {precision}",
            do="Build with --precision bf16; what is sensitive stays in float32.",
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device for {backend}", got=repr(str(device)), wanted="cpu, cuda")
    product = open_product(backend)
    if device.type == "cuda":
        refuse_tf32_override()
        here = read_here(product, device)
        if product.is_rtx and here.compute_capability not in (known := bf16_targets(product)):
            raise IncompatibleError(
                f"plans of {product} in bfloat16 are not compiled for this GPU",
                got=f"{here.gpu}, {here.compute_capability}",
                wanted=f"one of {', '.join(known)}",
                do="Use --backend tensorrt.",
            )
    elif not product.is_rtx:
        missing = missing_gpu()
        raise IncompatibleError(
            f"{product} builds on the GPU it builds for, and runs there",
            got=f"device {device}" + (f" on a machine with {missing}" if missing else ""),
            wanted="--device cuda on a machine with that GPU and NVIDIA's driver",
            do="`--backend tensorrt-rtx` compiles without a GPU.",
        )


def open_engine(
    backend: str,
    bundle: Bundle,
    resolution: str,
    device: str = "cuda",
    like: Engine | None = None,
    options: Mapping[str, object] | None = None,
) -> TrtEngine:
    """Open the plans of one resolution on a GPU, each plan's SHA-256 checked as it is read.

    Weights outside the plans are a large file, hashed only where the bundle was opened so.

    With an open engine to be `like`, both use one workspace and, where their plans take them from
    outside, one set of weights; they must not run at the same time.

    Raises:
        UsageError: the bundle has no such engine.
        IncompatibleError: no GPU, or the plans were built for something else; says the command
            that rebuilds.
    """
    engine_record(bundle, backend, resolution)
    how = run_options(options or {})
    where = torch.device(device)
    if where.type != "cuda":
        raise IncompatibleError(
            f"{backend} engines run on NVIDIA GPUs", got=f"device {device}", do="Use --device cuda."
        )
    product = open_product(backend)
    here = read_here(product, where)
    shared = like if isinstance(like, TrtEngine) else None
    workspace = shared.workspace if shared else Workspace(CudaOps(where))
    return engine_from(product, here, bundle, resolution, workspace, shared, how)


class Asked(BaseModel):
    """What a caller may ask for in words; `RunOptions` describes it."""

    model_config = ConfigDict(extra="forbid")

    weight_budget: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    cuda_graph: bool = False


def run_options(given: Mapping[str, object]) -> RunOptions:
    """Options by their names. UsageError names the one that is wrong."""
    try:
        return RunOptions(**Asked.model_validate(dict(given)).model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"TensorRT engines do not take the option {first['loc'][0]}: {first['msg']}",
            got=repr(given.get(str(first["loc"][0]))),
            wanted=f"one of {', '.join(Asked.model_fields)}",
        ) from error


def engine_from(
    product: Product,
    here: Here,
    bundle: Bundle,
    resolution: str,
    workspace: Workspace,
    like: TrtEngine | None = None,
    options: RunOptions | None = None,
) -> TrtEngine:
    """The engine of a bundle's plans, in a workspace.

    Raises:
        IncompatibleError: built elsewhere; names the fields and the command that rebuilds.
    """
    record = engine_record(bundle, product.name, resolution)
    built = built_for(record)
    rebuild = rebuild_command(bundle.manifest, product.name, resolution, here.compute_capability)
    check_target(built, here, rebuild)
    weights, options = SharedWeights(), options or RunOptions()
    if record.calls:
        given = like.shared_weights if like else None
        weights = shared_weights(bundle, record, workspace.ops.device, given)
    elif record.options["strip_plan"] or (bundle.manifest.baked and record.options["refit"]):
        # Others hold the bundle's weights; these hold none, or those from before the LoRAs.
        options = replace(options, weights=map_weights(bundle.path(WEIGHTS)))
    return TrtEngine(
        product,
        plan_files(bundle, record),
        workspace,
        options,
        calls=[call_from(record, call) for call in record.calls] or None,
        shared_weights=weights,
        host_code=built.version_compatible,
    )


def plan_files(bundle: Bundle, record: EngineRecord) -> list[PlanFile]:
    """The plans with what the manifest says of their files."""
    files = bundle.manifest.files
    return [
        PlanFile(bundle.path(plan.file), files[plan.file].bytes, files[plan.file].sha256)
        for plan in record.plans
    ]


def call_from(record: EngineRecord, call: CallRecord) -> Call:
    """A call with the weights' names spelled out."""
    weights = (tensor.name for tensor in record.plans[call.plan].weights)
    return Call(call.plan, {**call.tensors, **{name: call.prefix + name for name in weights}})


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
