"""What ONNX Runtime's GPU providers say of our graphs, options and models, without a GPU.

    pip install --target WHEEL --no-deps onnxruntime-gpu==1.31.1
    python tools/ort_providers_without_gpu.py WHEEL

The wheel's own CUDA and TensorRT libraries are loaded over stand-ins for NVIDIA's, compiled here:
one function for each symbol they need, which answers success and computes nothing. So options are
parsed, graphs are partitioned and EPContext models are opened by the real code; nothing is run.
Needs gcc and nm. Every check is a process of its own: a stand-in may well make ONNX Runtime crash.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcexport.engines.manifest import EngineRecord, GraphRecord

SIZE = "64x96x9"
TENSORRT_MAJOR = 10
# Symbols without a version in the provider's table, and the library that has them.
UNVERSIONED = {
    r"createInfer.*|getInferLibVersion|getPluginRegistry": f"libnvinfer.so.{TENSORRT_MAJOR}",
    r"createNvOnnx.*": f"libnvonnxparser.so.{TENSORRT_MAJOR}",
    r"cuTensorMapEncodeTiled": "libcuda.so.1",
}
PRELUDE = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"
# Those that must do more than return 0.
BODIES = {
    "cudaGetDeviceCount": "int f(int *n) { *n = 1; return 0; }",
    "cudaRuntimeGetVersion": "int f(int *n) { *n = 13000; return 0; }",
    "cudaDriverGetVersion": "int f(int *n) { *n = 13000; return 0; }",
    "cudaGetErrorString": 'const char *f(int e) { return "stand-in"; }',
    "cudaGetErrorName": 'const char *f(int e) { return "stand-in"; }',
    "cudaMemGetInfo": "int f(size_t *a, size_t *b) { *a = *b = 1ul << 34; return 0; }",
    "cudaMalloc": "int f(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaMallocHost": "int f(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaHostAlloc": "int f(void **p, size_t n, int k) { *p = malloc(n); return 0; }",
    "cudaFree": "int f(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int f(void *p) { free(p); return 0; }",
    "cudaMemcpy": "int f(void *d, void *s, size_t n) { memcpy(d, s, n); return 0; }",
    "cudaMemcpyAsync": "int f(void *d, void *s, size_t n) { memcpy(d, s, n); return 0; }",
    "cudaDeviceGetAttribute": "int f(int *v, int a) { *v = a == 75 ? 9 : 64; return 0; }",
    "cudaGetDeviceProperties": "int f(char *p) { memset(p, 0, 900); p[360] = 9; return 0; }",
    "getInferLibVersion": f"int f(void) {{ return {TENSORRT_MAJOR}1600; }}",
    **dict.fromkeys(
        (
            *("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate"),
            *("cudaEventCreateWithFlags", "cublasCreate_v2", "cublasLtCreate"),
        ),
        "int f(void **p) { *p = (void *)16; return 0; }",
    ),
    # A C++ object whose every method says its number and first argument, and returns 0.
    **dict.fromkeys(
        ("createInferRuntime_INTERNAL", "createInferBuilder_INTERNAL", "getPluginRegistry"),
        "void *f(void) { void **p = malloc(64); p[0] = table; p[1] = p; return p; }",
    ),
}
METHODS = 64


def main(wheel: Path) -> None:
    """Make stand-ins and a bundle, and print a line for each check."""
    with tempfile.TemporaryDirectory() as folder:
        stand_ins, bundle = Path(folder, "lib"), Path(folder, "bundle")
        stand_ins.mkdir()
        for library, symbols in needed_symbols(wheel).items():
            compile_stand_in(stand_ins, library, symbols)
        make_bundle(bundle)
        paths = [str(wheel), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(stand_ins),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        for name in CHECKS:
            command = [sys.executable, __file__, "--check", name, str(bundle)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("said: ")]
            said = lines[-1].removeprefix("said: ") if lines else f"crashed ({done.returncode})"
            flags = re.findall(r"builder method 8\((\w+)\)", done.stderr)
            print(f"{name}: {said}" + (f"; createNetworkV2({flags[-1]})" if flags else ""))


def needed_symbols(wheel: Path) -> dict[str, set[str]]:
    """NVIDIA's library -> what the wheel's two providers need of it."""
    needed: dict[str, set[str]] = defaultdict(set, {"libcurand.so.10": set()})
    for provider in ("cuda", "tensorrt"):
        path = wheel / f"onnxruntime/capi/libonnxruntime_providers_{provider}.so"
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
        )
        for line in listed.stdout.splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            if version.startswith("lib"):
                needed[version].add(symbol)
            for pattern, library in UNVERSIONED.items():
                if re.fullmatch(pattern, symbol):
                    needed[library].add(symbol)
    return needed


def compile_stand_in(folder: Path, library: str, symbols: set[str]) -> None:
    """One shared library with these symbols, under their version where they have one."""
    source = [PRELUDE]
    for index in range(METHODS):
        source.append(
            f"static long m{index}(void *t, long a) {{"
            f' fprintf(stderr, "builder method {index}(%ld)\\n", a); return 0; }}'
        )
    source.append(f"static void *table[] = {{{', '.join(f'm{i}' for i in range(METHODS))}}};")
    for symbol in sorted(symbols):
        body = BODIES.get(symbol, "long f(void) { return 0; }")
        source.append(re.sub(r"\bf\(", f"{symbol}(", body, count=1))
    text = folder / f"{library}.c"
    text.write_text("\n".join(source), "utf-8")
    command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-fno-builtin"]
    if not library.startswith(("libnv", "libcuda.")) and symbols:
        (folder / f"{library}.map").write_text(f"{library} {{ global: *; }};\n", "utf-8")
        command.append(f"-Wl,--version-script={folder / library}.map")
    subprocess.run([*command, "-o", str(folder / library), str(text)], check=True)


def make_bundle(folder: Path) -> None:
    """The demo checkpoint's bf16 graph, and models around one and two files that are no plans."""
    from lcexport.builder import BuildOptions, build
    from lcexport.configs.presets import preset_from
    from lcexport.demo import make_demo_checkpoint
    from lcexport.engines.manifest import EngineRecord, PlanRecord, TensorRecord

    checkpoint = folder.with_name("checkpoint")
    make_demo_checkpoint(checkpoint)
    made = build(
        BuildOptions(
            model=checkpoint, output=folder, presets=(preset_from(SIZE),), precision="bf16",
            only="export",
        )
    )  # fmt: skip
    graph = made.graph(SIZE)
    (folder / "no.plan").write_bytes(b"not a plan")
    between = (TensorRecord(name="x", shape=(2, 3), dtype="bfloat16"),)

    def wrap(name: str, *borders: tuple[TensorRecord, ...]) -> None:
        plans = tuple(
            PlanRecord(
                file="no.plan", first_block=0, last_block=3, inputs=inputs, outputs=outputs,
                attentions=8,
            )
            for inputs, outputs in pairwise(borders)
        )  # fmt: skip
        engine = EngineRecord(
            plans=plans, product="tensorrt", version="10.16.1", platform="linux-x86_64",
            compute_capabilities=("sm90",), gpu=None, driver=None, options={}, verified=False,
        )  # fmt: skip
        save_wrapped(engine, graph, folder / name)

    wrap("one.onnx", graph.inputs, graph.outputs)
    wrap("two.onnx", graph.inputs, between, graph.outputs)


def save_wrapped(engine: "EngineRecord", graph: "GraphRecord", path: Path) -> None:
    """For TensorRT's provider, whatever the number of plans: `wrap_plans` would refuse two."""
    import onnx_ir as ir

    from lcexport.engines import PROVIDERS
    from lcexport.graph import save_graph
    from lcexport.graph.epcontext import wrap_plans

    model = wrap_plans("tensorrt-rtx", engine, graph, "0")
    for node in model.graph:
        node.attributes["source"] = ir.AttrString("source", PROVIDERS["tensorrt"])
    save_graph(model, path)


def open_session(graph: Path, provider: str, **extra: str) -> Any:
    """A session with the options that our engine gives the provider, and `extra`."""
    import onnxruntime as ort
    import torch

    from lcexport.engines.ort_providers import options_of

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    given = {**options_of(provider, torch.device("cuda", 0), 4660), **extra}
    return ort.InferenceSession(
        str(graph), options, providers=[(provider, given)], enable_fallback=0
    )


def cuda_places_every_operation(bundle: Path) -> str:
    session = open_session(bundle / f"dit.{SIZE}.onnx", "CUDAExecutionProvider")
    placed: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        placed[part.ep_name] += len(part.get_nodes())
    effective = session.get_provider_options()["CUDAExecutionProvider"]
    kept = {key: effective[key] for key in ("use_tf32", "arena_extend_strategy", "device_id")}
    return f"{dict(placed)} {json.dumps(kept)}"


CHECKS = {
    "CUDA, the bf16 graph": cuda_places_every_operation,
    "CUDA, an unknown option": lambda bundle: open_session(
        bundle / f"dit.{SIZE}.onnx", "CUDAExecutionProvider", nonsense="1"
    ),
    "TensorRT, one EPContext node": lambda bundle: open_session(
        bundle / "one.onnx", "TensorrtExecutionProvider"
    ),
    "TensorRT, two EPContext nodes": lambda bundle: open_session(
        bundle / "two.onnx", "TensorrtExecutionProvider"
    ),
    "TensorRT, an unknown option": lambda bundle: open_session(
        bundle / "one.onnx", "TensorrtExecutionProvider", has_user_compute_stream="1"
    ),
    "TensorRT, the graph": lambda bundle: open_session(
        bundle / f"dit.{SIZE}.onnx", "TensorrtExecutionProvider"
    ),
}


def check(name: str, bundle: Path) -> None:
    """Run one check; what ONNX Runtime says is the result, whether it refuses or not."""
    try:
        said = CHECKS[name](bundle)
    except Exception as error:
        said = " ".join(str(error).split())[-220:]
    print(f"said: {said}")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]).resolve())
