"""TensorRT and TensorRT for RTX: one implementation, given the module.

product    the module, its version, its log; what is missing and how to get it
options    what a build may be asked for
network    the parsed network, walked: attention fused, islands in float32
compile    a network into a plan, streamed and hashed
worker     the same in a process of its own, which may crash
probe      what a product can do here, asked in a process of its own
timing     the timing cache, merged back whole
reader     a plan file, checked before it is deserialised
runtime    plans in order, bound by address, on one stream
memory     one block of device memory for all of them
refit      weights put back from the bundle's one file
backend    a bundle's plans as an engine

Where no other source is named, what these modules say of TensorRT beyond what the tests build is
from its documentation or the bindings' source; no plan of ours was run.
"""
