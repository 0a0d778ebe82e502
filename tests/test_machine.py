"""What a figure was measured on."""

import os
from types import SimpleNamespace

import torch

from lcexport import machine
from lcexport.machine import device_facts, environment, processor_name


def test_the_environment_names_versions_and_platform():
    found = environment(torch.device("cpu"), ["onnxruntime", "eager"])
    assert found["torch"] == torch.__version__
    assert {"started", "platform", "python", "onnxruntime"} <= found.keys()
    assert "gpu" not in found


def test_a_processors_threads_make_another_device(monkeypatch):
    before = device_facts(torch.device("cpu"))
    assert before["processors"] == len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert device_facts(torch.device("cpu")) == {**before, "torch_threads": 99}


def test_a_gpu_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert device_facts(torch.device("cuda:0")) == {"type": "cuda", "name": "H200"}


def test_a_processor_without_a_name_is_its_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machine, "platform", SimpleNamespace(machine=lambda: "riscv64"))
    assert processor_name() == "riscv64"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert processor_name() == "A Processor"
