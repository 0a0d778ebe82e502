"""Each option reaches the builder, or is refused; none is ignored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from lcexport.configs.errors import BuildError, IncompatibleError, UsageError
from lcexport.engines.trt import options
from lcexport.engines.trt.options import TrtOptions, configure, require_supported
from lcexport.engines.trt.product import MessageLog, Product, builder_for, logger_for

GRAPHS = "REQUIRE_USER_ALLOCATION"


@pytest.fixture
def configured(rtx: Product):
    """`configured(refit=True)` is a real builder configuration, with what it was made by."""
    kept = []

    def make(**options):
        logger = logger_for(rtx, MessageLog())
        builder = builder_for(rtx, logger)
        kept.extend([logger, builder])
        return configure(rtx, builder, TrtOptions(**options)), builder

    return make


@pytest.fixture
def enterprise(rtx: Product) -> Product:
    """The other product's name over the same API: what is refused before anything is built."""
    return Product("tensorrt", rtx.trt, (11, 4))


def test_float32_products_are_float32(rtx: Product, configured):
    flag = rtx.trt.BuilderFlag.TF32
    _, builder = configured()
    assert builder.create_builder_config().get_flag(flag), "on by default: the reason to clear it"
    config, _ = configured(weight_streaming=True, workspace_bytes=1 << 30)
    assert not config.get_flag(flag)


def flags_of(product: Product, config) -> set[str]:
    members = product.trt.BuilderFlag.__members__
    return {name for name, flag in members.items() if config.get_flag(flag)}


def test_defaults_set_the_flag_that_cuda_graphs_need_and_no_other(rtx: Product, configured):
    config, _ = configured()
    assert flags_of(rtx, config) == {"REQUIRE_USER_ALLOCATION"}
    assert config.profiling_verbosity == rtx.trt.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level == 3
    assert config.max_aux_streams == 0
    assert config.num_compute_capabilities == 0


def test_each_option_reaches_the_builder(rtx: Product, configured):
    config, builder = configured(
        workspace_bytes=3 << 30,
        optimization_level=5,
        max_aux_streams=2,
        max_threads=3,
        compute_capabilities=("SM89", "sm120"),
    )
    trt = rtx.trt
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 << 30
    assert config.builder_optimization_level == 5
    assert config.max_aux_streams == 2
    assert builder.max_threads == 3
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"strip_plan": True}, {"STRIP_PLAN", "REFIT_INDIVIDUAL", GRAPHS}),
        ({"refit": True}, {"REFIT_INDIVIDUAL", GRAPHS}),
        ({"strip_plan": True, "refit": True}, {"STRIP_PLAN", "REFIT_INDIVIDUAL", GRAPHS}),
    ],
)
def test_each_wish_is_its_flags_and_no_others(rtx: Product, configured, options, flags):
    config, _ = configured(**options)
    assert flags_of(rtx, config) == flags


def test_the_compiler_refuses_streaming_with_what_cuda_graphs_need(
    compile_text, monkeypatch: pytest.MonkeyPatch
):
    """The reason to set one or the other."""

    def both(product, options):
        known = product.trt.BuilderFlag
        return [known.WEIGHT_STREAMING, known.REQUIRE_USER_ALLOCATION]

    monkeypatch.setattr(options, "builder_flags", both)
    with pytest.raises(BuildError, match="conflicts with user-managed allocation"):
        compile_text("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }")


def test_the_compiler_has_no_lean_runtime_for_plans_of_several_versions(
    compile_text, monkeypatch: pytest.MonkeyPatch
):
    """The reason to refuse `version_compatible`."""
    monkeypatch.setattr(
        options,
        "builder_flags",
        lambda product, options: [product.trt.BuilderFlag.VERSION_COMPATIBLE],
    )
    with pytest.raises(BuildError, match=r"Unable to load library: libnvinfer_lean\.so\.1"):
        compile_text("g (float[2] x) => (float[2] y) { y = Add (x, x) }")


def test_the_compiler_ignores_hardware_compatibility(rtx: Product):
    """The reason to refuse `hardware_compatibility`: it warns, and goes on without."""
    log = MessageLog()
    logger = logger_for(rtx, log)
    config = builder_for(rtx, logger).create_builder_config()
    config.hardware_compatibility_level = rtx.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    said = "HardwareCompatibilityLevel() is unsupported in TensorRT-RTX"
    # a process with another logger is warned of that, too
    assert any(said in warning for warning in log.warnings)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 6},
        {"workspace_bytes": 0},
        {"max_threads": 0},
        {"hardware_compatibility": "turing"},
        {"fp16": True},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        TrtOptions(**options)


def test_a_target_named_twice_is_refused():
    with pytest.raises(ValidationError, match="named twice: sm89, sm89"):
        TrtOptions(compute_capabilities=("sm89", "SM89"))


@pytest.mark.parametrize("name", ["sm90", "sm100", "current", "none", "89"])
def test_an_unknown_target_names_the_known_ones(rtx: Product, name):
    with pytest.raises(UsageError, match=r"wanted some of sm80, sm86, sm89, sm120, sm121$"):
        require_supported(rtx, TrtOptions(compute_capabilities=(name,)))


@pytest.mark.parametrize(
    "options",
    [
        {"hardware_compatibility": "ampere_plus"},
        {"version_compatible": True},
        {"timing_cache": Path("cache")},
    ],
)
def test_rtx_refuses_what_it_lacks(rtx: Product, options):
    with pytest.raises(IncompatibleError, match=f"has no {next(iter(options))}"):
        require_supported(rtx, TrtOptions(**options))


def test_enterprise_takes_those_and_refuses_targets(enterprise: Product):
    options = TrtOptions(hardware_compatibility="ampere_plus", version_compatible=True)
    require_supported(enterprise, options)
    with pytest.raises(IncompatibleError, match="compiles for the GPU at hand"):
        require_supported(enterprise, TrtOptions(compute_capabilities=("sm89",)))


def test_enterprise_options_reach_the_builder(enterprise: Product):
    trt = enterprise.trt
    logger = logger_for(enterprise, MessageLog())
    options = TrtOptions(hardware_compatibility="same_compute_capability", version_compatible=True)
    sets: dict[str, object] = {}

    class Config(SimpleNamespace):
        def __setattr__(self, name, value):
            sets[name] = value

    flags: list[object] = []
    config = Config()
    config.__dict__ |= {"set_flag": flags.append, "clear_flag": lambda flag: None}
    builder: Any = SimpleNamespace(logger=logger, create_builder_config=lambda: config)
    configure(enterprise, builder, options)
    level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert sets["hardware_compatibility_level"] == level
    assert flags == [trt.BuilderFlag.VERSION_COMPATIBLE]
