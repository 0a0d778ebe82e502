"""What production embeds stays light: checked in a fresh interpreter."""

import subprocess
import sys

FORBIDDEN = [
    *("onnx", "onnxscript", "onnx_ir", "onnxruntime", "tensorrt", "typer", "rich"),
    *("transformers", "diffusers", "av", "PIL", "ftfy"),
    *("lcexport.graph", "lcexport.builder", "lcexport.cli", "lcexport.dit", "lcexport.eager"),
]


def test_importing_the_runtime_is_light():
    code = (
        "import sys, lcexport.runtime;"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "[]\n"


def test_the_public_names_exist():
    import lcexport.runtime as runtime

    assert all(hasattr(runtime, name) for name in runtime.__all__)
