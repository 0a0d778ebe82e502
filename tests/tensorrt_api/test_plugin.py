"""The plugin against the real `tensorrt.plugin`, which is Python and checks our functions."""

import os
import subprocess
import sys

import pytest
from bindings_shim import make_shim, unpack_bindings

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt.product import open_product
from lcexport.engines.trt.sparse_plugin import Kernel, register_plugin

KERNEL = Kernel("kernel", "ptx", 128, 4096)

# The registry is native, so it is a stand-in; the rest is the package's own code.
PROBE = """
import sys
from types import SimpleNamespace as Some
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
made = {}
registry = Some(
    register_creator=lambda creator, space: made.update({(space, creator.name): creator}),
    get_creator=lambda name, version, space: made[space, name],
)
trt.get_plugin_registry = lambda: registry
from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt.product import Product
from lcexport.engines.trt.sparse_plugin import Kernel, plugin_functions, plugin_module
from lcexport.engines.trt.sparse_plugin import register_plugin
product, kernel = Product("tensorrt", trt, (11, 4)), Kernel("kernel", "ptx", 128, 4096)
register_plugin(product, kernel)
((key, creator),) = made.items()
assert key == ("lcexport", "KeptChunksAttention"), key
arguments = (*reversed(key), trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
instance = creator.create_plugin(*arguments, trt.QuickPluginCreationRequest.UNKNOWN)
assert "AOT" in type(instance).__name__, instance
assert not isinstance(instance, trt.IPluginV3QuickRuntime)  # nothing of it is called at run time
_, implement = plugin_functions(plugin_module(product), kernel)
trt.plugin._tensor.SymIntExpr._exprBuilder = Some(constant=lambda value: value)
shapes = ((6, 8, 64, 128), (6, 9, 64, 128), (6, 9, 64, 128), (6, 8, 3))
q, k, v, kept = (Some(shape_expr=shape) for shape in shapes)
name, ptx, launch, sizes = implement(q, k, v, kept, (q,), 0)
assert [size._expr for size in sizes] == [8, 9, 3]
found = [launch.grid_x, launch.grid_y, launch.block_x, launch.shared_mem]
assert [size._expr for size in found] == [8, 6, 128, 4096]
try:
    register_plugin(product, kernel)
except IncompatibleError as error:
    print("twice:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["11.4.0.106", "10.16.1.11", "10.14.1.48.post1"])
def test_the_real_plugin_module_takes_it(version, tmp_path):
    unpack_bindings(tmp_path, version)
    make_shim(tmp_path, version.partition(".")[0])
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "twice:" in done.stdout


def test_tensorrt_for_rtx_has_no_such_plugins():
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(IncompatibleError, match="ahead-of-time"):
        register_plugin(open_product("tensorrt-rtx"), KERNEL)
