"""What TensorRT's parsers and compilers accept, as tables and rules that need no TensorRT.

tables      products, operators and the element types each operator takes
rules       one node: operator, types, shapes; and what a violation is
attention   the Attention operator: what has a fused kernel
external    weights beside the graph: inside the bundle, and whole

`lcexport.graph.check` walks a graph with them.
"""
