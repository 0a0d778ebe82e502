"""Results on standard output: tables for people, JSON for programs. Knows not how they were made.

console     the one console, JSON, tables that are readable in 80 columns
build       a plan, a fresh bundle
bundle      a bundle, its checks, its video
checkpoint  a checkpoint and its conversion
machine     what a machine can do
qualification  what was proven of an engine
bench       what was measured
"""
