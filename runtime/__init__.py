"""What production embeds: a bundle in, videos out. torch and one engine, nothing of the exporter.

    from lcexport.runtime import load

    with load("bundle", "480p") as pipe:
        pipe.generate("a cat plays the piano", seed=7).save("cat.mp4")

opening.py    load: a bundle's folder to a pipeline; checks.py: what it makes sure of first
pipeline.py   Pipeline: all that can be asked of an opened bundle
generating.py text, sampling, decoding: the three stages in order
request.py    the arguments of one generation, checked; the initial noise
components.py engines, text encoder and VAE, opened once
conditioning.py  what a generation starts from beside text; cache.py: as keys and values
refining.py   finished videos, larger and longer
text.py       prompt -> UMT5 embeddings and mask
denoiser.py   engine of a fixed batch -> guided velocity of any number of samples
guidance.py   CFG-zero
sampler.py    the one sampling loop
schedule.py   noise levels and the Euler step
media.py      files with pictures and videos -> pixels, and their sizes
refine.py     finished frames -> where their refinement starts
long.py       segments that each continue the one before: long and interactive videos
long_refining.py   their refinement, window by window
segments.py   the folder of finished segments, from which both go on; its frames as one MP4
journal.py    what that folder is of
timing.py     how long each stage took
vae.py        frames -> latents -> frames
video.py      frames -> MP4, contact sheet
residency.py  where the text encoder and the VAE wait
cancel.py     stopping from another thread
"""

from lcexport.configs.errors import LcexportError
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.long import generate_long
from lcexport.runtime.long_refining import refine_long
from lcexport.runtime.opening import load
from lcexport.runtime.pipeline import Pipeline
from lcexport.runtime.sampler import StepEvent
from lcexport.runtime.segments import LongVideo
from lcexport.runtime.video import Video, save_frames

__all__ = [
    "CancelToken",
    "LcexportError",
    "LongVideo",
    "Pipeline",
    "StepEvent",
    "Video",
    "generate_long",
    "load",
    "refine_long",
    "save_frames",
]
