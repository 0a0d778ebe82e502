"""The double has no name, parameter, default or value that the real bindings have not."""

import importlib
import inspect
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

sys.path.append(str(Path(__file__).parents[1] / "tensorrt_api"))
api = importlib.import_module("surface")

CLASSES = {
    name: value
    for name, value in vars(fake_tensorrt).items()
    if isinstance(value, type)
    and value.__module__ == "fake_tensorrt"
    and (
        name.startswith("I")
        or name in {"EngineInspector", "Runtime", "Refitter", "Weights", "Logger", "Dims"}
    )
}
ENUMS = {
    name: value
    for name, value in vars(fake_tensorrt).items()
    if isinstance(value, type) and issubclass(value, Enum) and value.__module__ == "fake_tensorrt"
    if name != "Valued"
}
OWN = {"Stream", "Buffer", "HostStream", "HostOps", "Valued"}
RTX_ONLY = {("IExecutionContext", "is_stream_capturable")}


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.fixture(params=api.RELEASES)
def release(request) -> Any:
    return api.surface(request.param)


def test_everything_is_looked_at():
    made = {
        name
        for name, value in vars(fake_tensorrt).items()
        if isinstance(value, type) and value.__module__ == "fake_tensorrt"
    }
    assert made == set(CLASSES) | set(ENUMS) | OWN
    assert len(CLASSES) == 10


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_their_members_are_real(release, name):
    assert release.top(name) == "class"
    values = {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"}  # of ILogger.Severity
    for member in public(CLASSES[name]) - (values if name == "ILogger" else set()):
        kind = release.member(name, member)
        if is_foreign(release, name, member):
            assert kind is None
            continue
        static = inspect.getattr_static(CLASSES[name], member)
        own = "property" if isinstance(static, property | int) else "method"
        own = "enum" if inspect.isclass(static) else own
        assert kind == own, f"{release.release}: {name}.{member} is {kind}"
        if isinstance(static, property) and static.fset is not None:
            assert release.settable(name, member)


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_real(release, name):
    for method, function in vars(CLASSES[name]).items():
        if not inspect.isfunction(function) or (method.startswith("_") and method != "__init__"):
            continue
        if is_foreign(release, name, method):
            continue
        real = release.overloads(name, method)
        if method == "__init__" and not real:
            with pytest.raises(TypeError, match="No constructor defined"):
                CLASSES[name]()
            continue
        for overload in overloads_of(function):
            assert overload in real, f"{release.release}: {name}.{method}{overload} not in {real}"


def is_foreign(release: Any, name: str, member: str) -> bool:
    """Whether the double has it of the other product."""
    return (name, member) in RTX_ONLY and not release.release.startswith("rtx")


def overloads_of(function: Any) -> list[tuple[tuple[str, bool], ...]]:
    declared = getattr(function, "overloads", None)
    if declared is None:
        found = list(inspect.signature(function).parameters.values())[1:]
        return [tuple((one.name, one.default is not one.empty) for one in found)]
    return [tuple((name.rstrip("="), name.endswith("=")) for name in one) for one in declared]


def test_attributes_of_instances_are_real(release):
    logger = fake_tensorrt.Logger(fake_tensorrt.Severity.ERROR)
    runtime = fake_tensorrt.Runtime(logger)
    for thing in (logger, runtime):
        for name in vars(thing):
            if not name.startswith("_"):
                assert release.settable(type(thing).__name__, name)


@pytest.mark.parametrize("name", ENUMS)
def test_values_are_real(release, name):
    real = release.enums["ILogger.Severity" if name == "Severity" else name]
    assert {member.name: member.value for member in ENUMS[name]} == real


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        fake_tensorrt.Runtime("logger")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="incompatible function arguments"):
        fake_tensorrt.Weights(fake_tensorrt.DataType.FLOAT, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        fake_tensorrt.Weights(count=3)
