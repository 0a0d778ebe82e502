"""ONNX Runtime's execution providers: which one a backend asks for, its options, what it needs.

    onnxruntime                CPUExecutionProvider, or CUDAExecutionProvider on a GPU
    onnxruntime-tensorrt       TensorrtExecutionProvider, over the plans of `tensorrt`
    onnxruntime-tensorrt-rtx   NvTensorRTRTXExecutionProvider, over the plans of `tensorrt-rtx`

The last two get plans wrapped in an EPContext model and never a graph to compile: what TensorRT's
provider compiles (onnxruntime-gpu 1.31.1, with TensorRT 10) is weakly typed and may use TF32, and
there is no option against either, so that float32 would not stay float32 (docs/onnxruntime.md).
Options of compiling and its caches would have no effect and are not set. What the options mean is
from ONNX Runtime's documentation and sources: no provider but the CPU's ever computed anything.
"""

import importlib.util
import re
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines import PROVIDERS, TensorRT
from lcexport.engines.bundle import Bundle, check_file
from lcexport.engines.manifest import EngineRecord
from lcexport.engines.trt.backend import engine_record
from lcexport.engines.trt.options import refuse_tf32_override
from lcexport.engines.trt.product import OFFERS, loads
from lcexport.engines.trt.rebuild import rebuild_command

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = PROVIDERS["tensorrt"]
TENSORRT_RTX = PROVIDERS["tensorrt-rtx"]
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARIES = {CUDA: "cuda", TENSORRT: "tensorrt"}  # in onnxruntime-gpu: a library each
# Assumed to hold the names that ONNX Runtime's libraries were linked with: later ones are not seen.
LINKAGE_BYTES = 64 << 10
TENSORRT_LIBRARY = re.compile(r"lib(?:nvinfer\w*|nvonnxparser)\.so\.(\d+)")
LINKED = re.compile(rb"lib(?:cu|nv)\w+\.so\.\d+")

Providers = list[str | tuple[str, dict[str, str]]]


def provider_of(backend: str, device: torch.device) -> str:
    """The provider that runs `backend` on `device`."""
    if backend == "onnxruntime":
        return CUDA if device.type == "cuda" else CPU
    return PROVIDERS[compiled_by(backend)]


def compiled_by(backend: str) -> TensorRT:
    """The backend whose plans `backend` runs; UsageError where it runs none."""
    for compiled in PROVIDERS:
        if backend == f"onnxruntime-{compiled}":
            return compiled
    raise UsageError("not a backend of ONNX Runtime that runs plans", got=repr(backend))


def options_of(provider: str, device: torch.device, stream: int) -> dict[str, str]:
    """Provider options for one static shape on the caller's stream (a `cudaStream_t`'s address).

    TensorRT's provider takes the stream alone and refuses `has_user_compute_stream`; the plug-in
    wants both, and has its device from the session's options.
    """
    if provider == CPU:
        return {}
    if provider == TENSORRT_RTX:
        return {"has_user_compute_stream": "1", "user_compute_stream": str(stream)}
    options = {"device_id": str(device.index), "user_compute_stream": str(stream)}
    if provider == CUDA:
        options["use_tf32"] = "0"  # on by default: it would round float32 products to 10 bits
        # By default the arena grows by regions that double.
        options["arena_extend_strategy"] = "kSameAsRequested"
    return options


def configure(
    session: ort.SessionOptions,
    provider: str,
    device: torch.device,
    stream: int,
    *,
    cuda_graph: bool = False,
) -> Providers | None:
    """Add what `provider` needs to the session's options; what InferenceSession is to be given."""
    options = options_of(provider, device, stream)
    if cuda_graph:
        options["enable_cuda_graph"] = "1"
    if provider == CPU:
        # As torch, which runs the text encoder, the VAE and guidance: one setting for both, which
        # OMP_NUM_THREADS and torch.set_num_threads have. ONNX Runtime itself takes every core.
        session.intra_op_num_threads = torch.get_num_threads()
    else:
        # An operation the provider lacks is an error, not a silent trip through the host.
        session.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider == TENSORRT_RTX:
        session.add_provider_for_devices([plugin_device(device)], options)
        return None
    return [(provider, options)]


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`."""
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device for {backend}", got=repr(str(device)), wanted="cpu, cuda")
    provider = provider_of(backend, device)
    if device.type == "cuda":
        require_gpu(provider, device)
    elif provider != CPU:
        raise IncompatibleError(
            f"{backend} runs on NVIDIA GPUs", got=f"device {device}", do="Use --device cuda."
        )
    elif precision == "bf16":
        raise IncompatibleError(
            "ONNX Runtime has no bfloat16 arithmetic on processors",
            got="precision bf16 on cpu",
            do="Build with --precision fp32, or use --device cuda.",
        )


def require_gpu(provider: str, device: torch.device) -> None:
    """Raise IncompatibleError unless ONNX Runtime has `provider`, all it links to, and a GPU."""
    if provider in (TENSORRT, TENSORRT_RTX):
        refuse_tf32_override()
    if provider == TENSORRT_RTX:
        require_plugin()
    elif provider not in ort.get_available_providers():
        raise IncompatibleError(
            f"this onnxruntime has no {provider.removesuffix('ExecutionProvider')} provider",
            got=", ".join(ort.get_available_providers()),
            do="Both wheels hold the same files, so: pip uninstall -y onnxruntime onnxruntime-gpu "
            "&& pip install onnxruntime-gpu",
        )
    if not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device", do="Install a CUDA build of torch, or use --device cpu."
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UsageError("no such device", got=str(device), wanted=f"cuda:0 to cuda:{count - 1}")
    if provider in LIBRARIES:
        require_libraries(provider)


def require_libraries(provider: str) -> None:
    """Raise IncompatibleError where the loader lacks a library that `provider` is linked with.

    ONNX Runtime itself would log it, and then say no more than that the provider is not there.
    """
    if provider == TENSORRT:
        with suppress(ImportError, OSError, RuntimeError):  # a system's own needs no package
            import_module("tensorrt")  # brings its libraries, which pip puts off the loader's path
    folder = Path(ort.__file__).parent / "capi"
    missing = missing_libraries(folder / f"libonnxruntime_providers_{LIBRARIES[provider]}.so")
    if missing:
        raise IncompatibleError(
            f"{provider} of ONNX Runtime {ort.__version__} lacks libraries",
            got=f"no {', '.join(missing)}; torch is built for CUDA {torch.version.cuda}",
            wanted="NVIDIA's libraries in just these versions",
            do=cure(missing),
        )


def cure(missing: list[str]) -> str:
    """Where the missing libraries come from."""
    found = filter(None, map(TENSORRT_LIBRARY.fullmatch, missing))
    if majors := {int(name.group(1)) for name in found}:
        (major,) = majors
        oldest = max(OFFERS["tensorrt"].oldest, (major,))
        floor = ".".join(map(str, oldest))
        return f"pip install 'tensorrt-cu13>={floor},<{major + 1}', on a machine with CUDA."
    return "Install NVIDIA's driver, and the build of torch for that CUDA: it brings the others."


def missing_libraries(provider: Path) -> list[str]:
    """NVIDIA's libraries that a provider's library was linked with and the loader cannot find."""
    try:
        with provider.open("rb") as file:
            head = file.read(LINKAGE_BYTES)
    except OSError:
        return [provider.name]
    names = sorted({name.decode() for name in LINKED.findall(head)})
    return [name for name in names if not loads(name)]


def require_plugin() -> None:
    """Raise IncompatibleError unless the TensorRT for RTX plug-in is installed and loads."""
    if importlib.util.find_spec(PLUGIN) is None:
        raise IncompatibleError(
            "ONNX Runtime's plug-in for TensorRT for RTX is not installed",
            do=f"pip install {PLUGIN.replace('_', '-')}",
        )
    try:
        register_plugin()
    except Exception as error:  # ONNX Runtime has no common base for its own errors
        raise IncompatibleError(
            "ONNX Runtime's plug-in for TensorRT for RTX does not load",
            got=first_line(error),
            wanted="NVIDIA's driver with CUDA 13 (by its package)",
        ) from error


@cache  # ONNX Runtime keeps a registered library for the life of the process
def register_plugin() -> None:
    plugin = import_module(PLUGIN)
    ort.register_execution_provider_library(TENSORRT_RTX, plugin.get_library_path())


def plugin_device(device: torch.device) -> Any:
    """ONNX Runtime's name for the GPU that torch calls `device`: the one in the same slot."""
    require_plugin()
    here = torch.cuda.get_device_properties(device)
    slot = (here.pci_domain_id, here.pci_bus_id, here.pci_device_id)
    offered = [found for found in ort.get_ep_devices() if found.ep_name == TENSORRT_RTX]
    for found in offered:
        if slot_from(found.device.metadata.get("pci_bus_id", "")) == slot:
            return found
    raise IncompatibleError(
        f"TensorRT for RTX offers no {device}",
        got=f"{len(offered)} other devices",
        wanted="a GPU that RTX plans are compiled for: sm80, sm86, sm89, sm120 or sm121",
    )


def slot_from(text: str) -> tuple[int, ...]:
    """(domain, bus, device) from "0000:c1:00.0"; nothing from what is not such a name."""
    parts = re.fullmatch(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.[0-9]", text.lower())
    return tuple(int(part, 16) for part in parts.groups()) if parts else ()


def plans_model(bundle: Bundle, backend: str, resolution: str) -> tuple[Path, EngineRecord]:
    """The EPContext model of a bundle and what its plans were compiled by, every file hashed.

    A plan is executable code, and the provider reads it by itself: it is compared with the
    manifest here, right before. Whoever can change a file in between can change the manifest too.

    Raises:
        UsageError: the bundle has no such engine, or the engine no EPContext model.
        IntegrityError: a file is not the one the manifest names.
    """
    compiled = compiled_by(backend)
    record = engine_record(bundle, compiled, resolution)
    if record.ep_context is None:
        build = rebuild_command(bundle.manifest, compiled, resolution, wrapped_for=backend)
        raise UsageError(
            f"the {compiled} engine of {bundle.folder} has no EPContext model",
            do=f"Build it: {build}",
        )
    for name in (record.ep_context, *(plan.file for plan in record.plans)):
        check_file(bundle.path(name), bundle.manifest.files[name], hashed=True)
    return bundle.path(record.ep_context), record


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
