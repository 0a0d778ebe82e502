"""Import TensorRT's real Python bindings without TensorRT: names and signatures, nothing runs.

The package `tensorrt-cu13-bindings` holds the Python extension alone. To be imported it needs
nine symbols of three native libraries; here are empty ones, compiled in under a second.
"""

import subprocess
from pathlib import Path

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
    """Compile the stand-ins for one major version into `folder`, for LD_LIBRARY_PATH."""
    for library, source in SOURCES.items():
        name = f"{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", f"-Wl,-soname,{name}"]
        command += ["-o", str(folder / name), "-"]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True)
