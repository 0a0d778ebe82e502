"""Trains the small checkpoint that the demo and the tests use, from nothing, on a processor.

`python -m tools.train_toy --out FOLDER` makes all of it; README.md beside this file says more. Not
part of the wheel: what ships is the checkpoint.
"""
