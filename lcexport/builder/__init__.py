"""From a checkpoint to a bundle.

options    what is asked for
plan       what it will need, and the refusal where it is not there
staging    where it grows: lock, journal, resume, rename
stages     the work, one function a stage
run        the stages in order, and the manifest
"""

from lcexport.builder.options import (
    BuildOptions,
    default_model,
    default_output,
    options_from,
)
from lcexport.builder.plan import Plan, make_plan, refuse_shortage
from lcexport.builder.run import BuildProgress, build, preflight
from lcexport.builder.stages import open_source

__all__ = [
    "BuildOptions",
    "BuildProgress",
    "Plan",
    "build",
    "default_model",
    "default_output",
    "make_plan",
    "open_source",
    "options_from",
    "preflight",
    "refuse_shortage",
]
