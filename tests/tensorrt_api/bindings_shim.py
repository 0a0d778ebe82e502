"""Import TensorRT's real Python bindings without TensorRT: names and signatures, nothing runs.

The package `tensorrt-cu13-bindings` holds the Python extension alone. To be imported it needs
nine symbols of three native libraries; here are empty ones, compiled in under a second.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PIP_SECONDS = 60

SOURCES = {
    "libnvinfer": """
        #include <stddef.h>
        void *createInferBuilder_INTERNAL(void *logger, int version) { return NULL; }
        void *createInferRuntime_INTERNAL(void *logger, int version) { return NULL; }
        void *createInferRefitter_INTERNAL(void *e, void *logger, int version) { return NULL; }
        void *getPluginRegistry(void) { return NULL; }
        void *getBuilderPluginRegistry(int capability) { return NULL; }
    """,
    "libnvonnxparser": """
        #include <stddef.h>
        void *createNvOnnxParser_INTERNAL(void *n, void *logger, int version) { return NULL; }
        void *createNvOnnxParserRefitter_INTERNAL(void *r, void *l, int v) { return NULL; }
        int getNvOnnxParserVersion(void) { return 0; }
    """,
    "libnvinfer_plugin": "int initLibNvInferPlugins(void *l, const char *name) { return 1; }",
}


def make_shim(folder: Path, major: str) -> None:
    """Compile the stand-ins for one major version into `folder`, for LD_LIBRARY_PATH.

    Skips the test where there is no compiler.
    """
    if shutil.which("gcc") is None:
        pytest.skip("no gcc for the stand-ins of TensorRT's native libraries")
    for library, source in SOURCES.items():
        name = f"{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", f"-Wl,-soname,{name}"]
        command += ["-o", str(folder / name), "-"]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True)


def unpack_bindings(folder: Path, version: str) -> None:
    """Put the real bindings into `folder`, for PYTHONPATH; skip the test where there are none."""
    package = f"tensorrt-cu13-bindings=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    try:
        done = subprocess.run(
            [*command, package], capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{package} cannot be had: {error}")
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{package} cannot be had: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
