"""The kernel of block-sparse attention as an ahead-of-time plugin of TensorRT 10.14 or newer.

NOT EXECUTED by TensorRT. The real `tensorrt.plugin` of 10.14.1, 10.16.1 and 11.4.0 takes its
functions (`tests/tensorrt_api/test_plugin.py`, over a stand-in for the native registry), and the
kernel is compiled to PTX; no engine was built with it.

An ahead-of-time plugin is one kernel, so it replaces `lcexport::KeptChunksAttention`, the function
inside block-sparse attention that takes chunks and the list of those kept; the gate stays in
standard operators. By onnx-tensorrt's source the parser takes a plugin in place of a function where
the node names the plugin's namespace (ours do) and such a plugin is registered when it parses: by
the compiling process (`worker`), where the build was asked for it (`--trt sparse_kernel=plugin`).
The engine is then to hold the PTX (so the AOT tutorial of Torch-TensorRT says; not tried): running
it should need neither this plugin nor Triton. Where nothing is registered, the parser takes the
function, a loop over the query chunks: bounded in memory, and likely slow. TensorRT for RTX has
parsed and built it; with TensorRT it was not tried.

TensorRT for RTX has no `tensorrt.plugin` (its bindings lack the module, and its parser refuses
plugins of that kind): it always takes the function.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from lcexport.configs.errors import IncompatibleError
from lcexport.engines.trt.product import Product

NAMESPACE, NAME = "lcexport", "KeptChunksAttention"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. It takes q, k, v, kept, then the three sizes as int32, then the output.

    The sizes are the numbers of query chunks, of key chunks, and of chunks kept; its grid is
    (query chunks, batches times heads).
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def register_plugin(product: Product, kernel: Kernel) -> None:
    """Make `kernel` the plugin that this process's parsers take for the function.

    Call it once in a process, before parsing: the kernel's types and sizes are one graph's.

    Raises:
        IncompatibleError: the product has no ahead-of-time plugins, or one is registered already.
    """
    plugin = plugin_module(product)
    identifier = f"{NAMESPACE}::{NAME}"
    describe, implement = plugin_functions(plugin, kernel)
    try:
        plugin.register(identifier)(describe)
        plugin.aot_impl(identifier)(implement)
    except ValueError as error:
        raise IncompatibleError(f"{product} refuses the plugin {identifier}", got=error) from error


def plugin_module(product: Product) -> ModuleType:
    """`tensorrt.plugin`, where the product has it and it can take compiled kernels."""
    try:
        plugin = importlib.import_module(f"{vars(product.trt)['__name__']}.plugin")
    except ImportError as error:
        raise no_plugins(product, str(error)) from error
    if not hasattr(plugin, "aot_impl"):
        raise no_plugins(product, "tensorrt.plugin has no aot_impl")
    return plugin


def no_plugins(product: Product, got: str) -> IncompatibleError:
    return IncompatibleError(
        f"{product} has no ahead-of-time plugins",
        got=got,
        do="Build without the plugin: the graph holds a function in its place.",
    )


def plugin_functions(
    plugin: ModuleType, kernel: Kernel
) -> tuple[Callable[..., object], Callable[..., object]]:
    """What `register` and `aot_impl` want: the output's description, and the launch.

    There is no autotuning: the types are the network's, and the formats linear.
    """

    def describe(q, k, v, kept):
        return q.like()

    def implement(q, k, v, kept, outputs, tactic):
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y = q.shape_expr[1], q.shape_expr[0]
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared_bytes
        sizes = plugin.SymIntExprs(3)
        for index, size in enumerate((q.shape_expr[1], k.shape_expr[1], kept.shape_expr[2])):
            sizes[index] = plugin.SymInt32(size)
        return kernel.name, kernel.ptx, launch, sizes

    # TensorRT reads the types off the signatures, and a type of its own cannot be written above.
    describe.__annotations__ = dict.fromkeys(
        inspect.signature(describe).parameters, plugin.TensorDesc
    )
    describe.__annotations__["return"] = plugin.TensorDesc
    answer = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
    implement.__annotations__ = {"return": answer}
    return describe, implement
