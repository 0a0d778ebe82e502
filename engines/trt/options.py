"""What a build may be asked for, by the field's names; and how each wish reaches the builder.

What a product lacks is an error that says so; all else that is asked for reaches the builder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines.trt.product import Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
SparseKernel = Literal["graph", "plugin"]
AMPERE = 80  # as in sm80, the first with bfloat16
NOT_TARGETS = ("NONE", "CURRENT")  # no GPU architectures: CURRENT asks the driver for one
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


class TrtOptions(BaseModel):
    """Wishes of one build. The defaults are for one static shape and a model of many gigabytes.

    Attributes:
        workspace_bytes: scratch memory a layer may use; the builder's default where None.
        optimization_level: 0 (shortest build) to 5 (longest search).
        max_aux_streams: streams beside the caller's; 0 takes the least activation memory.
        hardware_compatibility: run on other GPUs than the building one (TensorRT only).
        version_compatible: run with newer versions of TensorRT (TensorRT only).
        weight_streaming: weights may stay on the host and come as they are needed.
        strip_plan: leave the weights out; they are put back by refitting.
        refit: weights may be exchanged by others.
        compute_capabilities: GPUs to compile for, such as `sm89` (TensorRT for RTX only); all
            that the product targets by itself where empty.
        max_threads: threads of the builder; its default where None.
        timing_cache: file of measured kernels, read before and added to after (TensorRT only).
        sparse_kernel: what block-sparse attention is compiled of: the graph's own operators, or
            our kernel as a `plugin` (TensorRT only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workspace_bytes: int | None = Field(default=None, ge=1 << 20)
    optimization_level: int = Field(default=3, ge=0, le=5)
    max_aux_streams: int = Field(default=0, ge=0, le=64)
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    strip_plan: bool = False
    refit: bool = False
    compute_capabilities: tuple[str, ...] = ()
    max_threads: int | None = Field(default=None, ge=1, le=1024)
    timing_cache: Path | None = None
    sparse_kernel: SparseKernel = "graph"

    @field_validator("compute_capabilities")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(name.lower() for name in names)
        if len(set(lowered)) != len(lowered):
            raise ValueError(f"a compute capability is named twice: {', '.join(lowered)}")
        return lowered


def require_supported(product: Product, options: TrtOptions) -> None:
    """Refuse what this product lacks, before anything is parsed.

    Raises:
        UsageError: no such compute capability.
        IncompatibleError: the option belongs to the other product.
    """
    for name in options.compute_capabilities:
        target_from(product, name)
    wished = {
        "hardware_compatibility": options.hardware_compatibility != "none",
        "version_compatible": options.version_compatible,
        "timing_cache": options.timing_cache is not None,
        "sparse_kernel=plugin": options.sparse_kernel == "plugin",
    }
    reasons = {
        "hardware_compatibility": "its plans are compiled for several GPUs: name those with "
        "compute_capabilities",
        "version_compatible": "it ships no lean runtime, and by NVIDIA's documentation a plan fits "
        "one release only",
        "timing_cache": "it says itself that its timing caches do nothing",
        "sparse_kernel=plugin": "it has no ahead-of-time plugins, and compiles the graph's own "
        "operators",
    }
    for option, wish in wished.items():
        if wish and product.is_rtx:
            raise IncompatibleError(
                f"{product} has no {option}", do=f"Leave it out: {reasons[option]}."
            )


def overrides_tf32() -> bool:
    """Whether the environment asks NVIDIA's libraries for TF32: at 0 it asks for none."""
    return os.environ.get(TF32_OVERRIDE, "") not in ("", "0")


def refuse_tf32_override() -> None:
    """Raise IncompatibleError where the environment may overrule the flag that `configure` clears.

    RTX 1.7.1 builds with TF32 where it is 1, whatever the flag. By NVIDIA's documentation it makes
    kernels where a plan runs, too; whether it asks the environment there was not tried.
    """
    if overrides_tf32():
        raise IncompatibleError(
            f"{TF32_OVERRIDE} asks for TF32, and float32 products are to be float32",
            got=f"{TF32_OVERRIDE}={os.environ[TF32_OVERRIDE]}",
            wanted="0, or no such variable",
            do=f"unset {TF32_OVERRIDE}",
        )


def configure(
    product: Product, builder: TensorRT.Builder, options: TrtOptions
) -> TensorRT.IBuilderConfig:
    """A builder configuration that does what `options` say, with true float32.

    Raises:
        UsageError, IncompatibleError: see `require_supported` and `refuse_tf32_override`.
    """
    require_supported(product, options)
    refuse_tf32_override()
    trt = product.trt
    config = builder.create_builder_config()
    # On by default: it lets inputs of float32 products be rounded to ten bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Without it the engine's inspector cannot name the attention kernels.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    config.max_aux_streams = options.max_aux_streams
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.max_threads is not None:
        builder.max_threads = options.max_threads
    if options.hardware_compatibility != "none":
        level = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = {
            "ampere_plus": level.AMPERE_PLUS,
            "same_compute_capability": level.SAME_COMPUTE_CAPABILITY,
        }[options.hardware_compatibility]
    for flag in builder_flags(product, options):
        config.set_flag(flag)
    set_targets(product, config, options.compute_capabilities)
    return config


def builder_flags(product: Product, options: TrtOptions) -> list[TensorRT.BuilderFlag]:
    """The flags to set, as members: their numbers differ between versions."""
    trt = product.trt
    flags = []
    if options.version_compatible:
        flags.append(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.weight_streaming:
        flags.append(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.strip_plan:
        flags.append(trt.BuilderFlag.STRIP_PLAN)
    if options.refit or options.strip_plan:
        # The weights of the bundle and no others: constants of the graph's own stay in the plan.
        flags.append(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if product.is_rtx and not options.weight_streaming:
        # By NVIDIA's documentation CUDA graphs need it; the builder refuses it with streaming.
        flags.append(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return flags


def set_targets(product: Product, config: TensorRT.IBuilderConfig, names: tuple[str, ...]) -> None:
    """Compile for these GPUs and no others."""
    if not names:
        return
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(target_from(product, name), index):
            raise UsageError(f"{product} refuses the compute capability", got=repr(name))


def target_from(product: Product, name: str) -> TensorRT.ComputeCapability:
    """The module's member for `sm89`.

    Raises:
        UsageError: the product does not target it.
        IncompatibleError: the product compiles for the GPU at hand only.
    """
    if not product.is_rtx:
        raise IncompatibleError(
            f"{product} compiles for the GPU at hand, not for compute capabilities",
            got=repr(name),
            do="Leave compute_capabilities out, or use --backend tensorrt-rtx.",
        )
    known = targets(product)
    if name not in known:
        raise UsageError(
            f"{product} does not compile for this compute capability",
            got=repr(name),
            wanted=f"some of {', '.join(bf16_targets(product))}",
        )
    return known[name]


def targets(product: Product) -> dict[str, TensorRT.ComputeCapability]:
    """The GPUs that a product compiles for whatever GPU is here, oldest first; none if that one."""
    if not product.is_rtx:
        return {}
    trt = product.trt
    known = {
        member.lower(): value
        for member, value in trt.ComputeCapability.__members__.items()
        if member not in NOT_TARGETS
    }
    return dict(sorted(known.items(), key=lambda pair: int(pair[0][2:])))


def bf16_targets(product: Product) -> tuple[str, ...]:
    """Those of `targets` that have bfloat16, and so can be compiled for."""
    return tuple(name for name in targets(product) if int(name.removeprefix("sm")) >= AMPERE)
