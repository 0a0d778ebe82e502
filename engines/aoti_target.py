"""What AOTInductor's packages are compiled for, and whether that is here.

A package is C++ compiled for the processor it was compiled on, and on CUDA for one kind of GPU; it
calls the very torch it was compiled with. All of that is in the manifest and compared field by
field before a package is opened.
"""

import platform
import re
from pathlib import Path

import torch

from lcexport.engines.manifest import EngineRecord
from lcexport.engines.trt.reader import refuse_differences, this_platform

BACKEND = "aotinductor"
CPUINFO = Path("/proc/cpuinfo")
# Of x86's flags those that a compiler may turn into instructions; of ARM's all are taken.
INSTRUCTIONS = re.compile(r"(s?sse|avx|amx|fma|f16c|bmi|abm|movbe|popcnt|v?aes|v?pclmul|gfni|adx)")


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this processor, by Linux's names, sorted; none where it is silent."""
    try:
        text = CPUINFO.read_text("ascii", "replace")
    except OSError:
        return ()
    found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return ()
    words = found[2].split()
    if platform.machine() == "x86_64":
        words = [word for word in words if INSTRUCTIONS.match(word)]
    return tuple(sorted(words))


def compute_capability(device: torch.device) -> tuple[str, ...]:
    """("sm90",) of a GPU; nothing of a processor."""
    if device.type == "cpu":
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return (f"sm{major}{minor}",)


def check_here(record: EngineRecord, device: torch.device, rebuild: str) -> None:
    """Compare what packages were compiled with and for with what is here.

    Args:
        rebuild: the command that compiles them here.

    Raises:
        IncompatibleError: names every field that differs, with both values.
    """
    was, here = set(features_of(record)), set(cpu_features())
    version = str(torch.__version__)
    built_for, gpus = record.options["device"], compute_capability(device)
    pairs = [
        ("torch", record.version == version, record.version, version),
        ("platform", record.platform == this_platform(), record.platform, this_platform()),
        ("device", built_for == device.type, built_for, device.type),
        (
            "compute capability",
            built_for != device.type or record.compute_capabilities == gpus,
            " or ".join(record.compute_capabilities),
            " or ".join(gpus),
        ),
        (
            "instruction set",
            was <= here or record.platform != this_platform(),
            f"{', '.join(sorted(was - here))} as well",
            "a processor without",
        ),
    ]
    refuse_differences(pairs, rebuild)


def features_of(record: EngineRecord) -> tuple[str, ...]:
    """The instruction sets that a package may use."""
    features = record.options["cpu_features"]
    assert isinstance(features, list | tuple)
    return tuple(map(str, features))
