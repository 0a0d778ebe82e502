"""Do the engines do what lcexport claims? Measured on the machine at hand, claim by claim.

run          the checks in order, and the two files they leave: start here
claims       claims, verdicts, results
subject      the engine in question, and how to open it
files        files, inputs and outputs, and the levels of `verify`
fusion       fused attention and float32 islands, as TensorRT's inspector tells
exactness    identical rows, repeated runs, refitting there and back
speed        latency against eager torch and torch.compile; the share of the device's arithmetic
costs        cold and warm start, memory, the seams between segments
cold         the process that a cold start is measured in
bisect       the first block that leaves the tolerance
page         the report for people

Nothing is imported here: `cold` measures a process that loads no more than it needs.
"""
