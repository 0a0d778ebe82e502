"""The machine and the software that something was measured on and with."""

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lcexport.engines.trt.memory import driver_version
from lcexport.engines.trt.product import OFFERS, open_product

PACKAGES = ("lcexport", "torch", "onnxruntime", "onnxruntime-gpu", "polygraphy", "triton")
CPUINFO = Path("/proc/cpuinfo")


def environment(device: torch.device, backends: Iterable[str]) -> dict[str, object]:
    """What the figures depend on, by name; what is not installed is left out."""
    found: dict[str, object] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        **packages(),
    }
    for backend in backends:
        if backend in OFFERS:
            product = open_product(backend)
            found[product.name] = str(product.trt.__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "driver_cuda": driver_version(),
            "torch_cuda": torch.version.cuda,
        }
    return found


def packages() -> dict[str, object]:
    """Versions of the packages that are installed."""
    found: dict[str, object] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_facts(device: torch.device) -> dict[str, object]:
    """What makes two devices the same for a figure: the GPU, or the processor and its threads."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {
        "type": "cpu",
        "name": processor_name(),
        "processors": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The processor's model, or its architecture where the kernel names none."""
    lines = CPUINFO.read_text("utf-8").splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
