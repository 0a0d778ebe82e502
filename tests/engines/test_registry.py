"""Backends by name; none is imported before it is asked for."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines import (
    BACKENDS,
    TENSORRT,
    backend_module,
    open_engine,
    require_backend,
    same_device,
)
from lcexport.engines.bundle import open_bundle


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_opens_engines(backend):
    assert callable(import_module(backend_module(backend)).open_engine)


@pytest.mark.parametrize("name", ["", "ort", "ONNXRUNTIME", "os"])
def test_an_unknown_backend_is_told_the_known_ones(demo_bundle, name):
    with pytest.raises(UsageError, match=f"one of {', '.join(BACKENDS)}") as caught:
        open_engine(name, open_bundle(demo_bundle), "64x96x9")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_an_unknown_resolution_is_told_the_known_ones(demo_bundle, backend):
    with pytest.raises(UsageError, match="got '480p'; wanted one of 64x96x9"):
        open_engine(backend, open_bundle(demo_bundle), "480p")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", ["meta", "mps", "toaster", ""])
def test_a_device_engines_do_not_run_on(demo_bundle, backend, device):
    with pytest.raises(UsageError, match=r"unknown device.*wanted cpu, cuda or cuda:N"):
        open_engine(backend, open_bundle(demo_bundle), "64x96x9", device)


def test_cuda_is_its_first_device():
    cuda, first, second = (torch.device(name) for name in ("cuda", "cuda:0", "cuda:1"))
    assert same_device(cuda, first)
    assert not same_device(cuda, second)
    assert not same_device(cuda, torch.device("cpu"))


@pytest.mark.parametrize("backend", TENSORRT)
def test_tensorrt_refuses_a_float32_bundle(demo_bundle, backend):
    with pytest.raises(IncompatibleError, match="--precision bf16"):
        open_engine(backend, open_bundle(demo_bundle), "64x96x9")


def test_a_library_that_does_not_load_is_said_to_be_missing(monkeypatch, tmp_path):
    (tmp_path / "half.py").write_text("import math; math.NodeArg")
    monkeypatch.syspath_prepend(tmp_path)
    for module, got in (("half", "no attribute 'NodeArg'"), ("none_such", "No module named")):
        monkeypatch.setitem(BACKENDS, "onnxruntime", module)
        with pytest.raises(IncompatibleError, match=f"library of onnxruntime .*{got}"):
            require_backend("onnxruntime", "fp32", "cpu")


def test_the_contract_imports_no_backend():
    code = "import sys, lcexport.engines as e; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
