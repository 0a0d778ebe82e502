"""Our rules for graphs that TensorRT compiles, as tables and code that need no TensorRT.

tables      products, operators and the element types each operator takes
rules       one node: operator, types, shapes; and what a violation is
attention   the Attention operator: what of it is built
external    weights beside the graph: inside the bundle, and whole

`lcexport.graph.check` walks a graph with them.
"""
