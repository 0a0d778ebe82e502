"""How fast is it? Backends side by side in one run, and a service's figures of each.

run       the checks before anything is measured, and the measurements in order: start here
subject   what is measured: contestants, each a backend of a bundle, and what they have in common
steps     guided steps, taken in turn in one process, beside the device's own matrix products
service   the process in which one contestant serves requests: cold start, stages, memory
compiled  the `compile` contestant: torch.compile's engine
compare   against an earlier run, with a limit
plot      the figures as a picture
example   the demo's big sibling: a checkpoint and its bundles in a temporary folder

What a run found is one JSON document, from which the table, the picture and the comparison are
made: `lcexport.bench.run.SCHEMA_VERSION`, described in docs/benchmarking.md.

Nothing is imported here: `service` measures a process that loads no more than it needs.
"""
