"""From the native DiT to a checked ONNX graph."""

from lcexport.graph.assemble import onnx_from_cache, onnx_from_dit, save_graph
from lcexport.graph.precision import prove_precision
from lcexport.graph.trace import GraphSpec

__all__ = ["GraphSpec", "onnx_from_cache", "onnx_from_dit", "prove_precision", "save_graph"]
