"""The machine and the software that a qualification ran on and with."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from lcexport.engines.trt.memory import driver_version
from lcexport.engines.trt.product import open_product
from lcexport.qualify.subject import Subject

PACKAGES = ("lcexport", "torch", "onnxruntime", "onnxruntime-gpu", "polygraphy", "triton")


def environment(subject: Subject) -> dict[str, object]:
    """What the figures depend on, by name; what is not installed is left out."""
    found: dict[str, object] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        **packages(),
    }
    if subject.compiled:
        product = open_product(subject.backend)
        found[product.name] = str(product.trt.__version__)
    if subject.on_gpu:
        properties = torch.cuda.get_device_properties(subject.device)
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
