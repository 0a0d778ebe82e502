"""What a product can do here, asked of a child that may fail, crash or hang."""

import sys

import pytest

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt import probe as probing
from lcexport.engines.trt.probe import ProductState, probe, require_builder
from lcexport.engines.trt.product import Product


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """`pretend("os.abort()")` asks a child that does that instead."""

    def run(code: str) -> ProductState:
        command = (sys.executable, "-c", f"import os, signal, sys, time; {code}")
        monkeypatch.setattr(probing, "COMMAND", command)
        return probe("tensorrt-rtx")

    return run


def test_rtx_makes_a_builder_without_a_gpu_and_says_what_it_compiles_for(rtx: Product):
    state = probe("tensorrt-rtx")
    assert state.error is None
    assert state.builder
    assert f"tensorrt-rtx {state.version}" == str(rtx)
    assert {"sm80", "sm89", "sm120"} <= set(state.targets)
    assert "sm75" not in state.targets  # it has no bfloat16
    require_builder("tensorrt-rtx")


def test_the_childs_error_is_the_answer(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.3.0'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state = probe("tensorrt")
    assert isinstance(state.error, IncompatibleError)
    assert "tensorrt is too old; got 10.3.0" in str(state.error)
    assert (state.version, state.builder, state.crashed) == (None, False, False)
    with pytest.raises(IncompatibleError, match="too old"):
        require_builder("tensorrt")


def test_a_version_is_known_even_where_no_builder_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text(
        "__version__ = '11.4.0.106'\n"
        "class ILogger: pass\n"
        "def Builder(logger): raise TypeError('factory function returned nullptr')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state = probe("tensorrt")
    assert (state.version, state.builder) == ("11.4.0.106", False)
    assert "cannot make a builder here; got factory function" in str(state.error)


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("sys.stderr.write('bad kernel'); sys.stderr.flush(); os.abort()", "SIGABRT | bad kernel"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.exit(3)", "status 3"),
    ],
)
def test_a_crash_is_an_answer(pretend, code, got):
    state = pretend(code)
    assert state.crashed
    assert f"tensorrt-rtx crashed or hung while it loaded or made a builder; got {got}" in str(
        state.error
    )


def test_a_child_that_hangs_is_an_answer(pretend, monkeypatch):
    monkeypatch.setattr(probing, "SECONDS", 0.2)
    state = pretend("time.sleep(60)")
    assert state.crashed
    assert "took more than 0.2 s" in str(state.error)
