"""What production embeds: a bundle in, videos out. torch and one engine, nothing of the exporter.

    from lcexport.runtime import load

    with load("bundle", "480p") as pipe:
        pipe.generate("a cat plays the piano", seed=7).save("cat.mp4")

pipeline.py   load, Pipeline: the three stages in order
checks.py     what load makes sure of first
request.py    the arguments of one generation, checked; the initial noise
text.py       prompt -> UMT5 embeddings and mask
denoiser.py   engine of a fixed batch -> guided velocity of any number of samples
guidance.py   CFG-zero
sampler.py    the one sampling loop
schedule.py   noise levels and the Euler step
media.py      files with pictures and videos -> pixels, and their sizes
refine.py     finished frames -> where their refinement starts
vae.py        frames -> latents -> frames
video.py      frames -> MP4, contact sheet
residency.py  where the text encoder and the VAE wait
cancel.py     stopping from another thread
"""

from lcexport.configs.errors import LcexportError
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.pipeline import Pipeline, load
from lcexport.runtime.sampler import StepEvent
from lcexport.runtime.video import Video

__all__ = ["CancelToken", "LcexportError", "Pipeline", "StepEvent", "Video", "load"]
