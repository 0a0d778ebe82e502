"""How many engines stay open, and which LoRAs the weights are expected to have."""

import logging

import numpy as np
import pytest
import torch

from lcexport.configs.errors import UsageError
from lcexport.engines.manifest import LoraRecord
from lcexport.runtime import load

OPTIONS = {"steps": 1, "guidance_scale": 1, "output": "latents"}


@pytest.fixture
def clip():
    """Frames uint8 [5, 64, 96, 3]."""
    return np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), np.uint8)


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_the_engine_that_made_a_cache_is_closed_before_the_next_opens(tiny, clip, backend):
    with load(tiny, "tiny", backend, tasks=["vc"]) as pipe:
        wanted = pipe.generate("a cat", video=clip, **OPTIONS)
        assert list(pipe.components._engines) == ["tiny.vc.cache", "tiny.vc"]
    with load(tiny, "tiny", backend, tasks=["vc"], keep_engines=1) as pipe:
        maker = pipe.components.engine(pipe.graph("vc", "cache"))
        assert list(pipe.components._engines) == ["tiny.vc.cache"]
        found = pipe.generate("a cat", video=clip, **OPTIONS)
        assert list(pipe.components._engines) == ["tiny.vc"]
        with pytest.raises(UsageError, match="the engine is closed"):
            maker.run({}, {})
        again = pipe.generate("a cat", video=clip, **OPTIONS)
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


def test_the_engine_used_longest_ago_goes_first(tiny):
    with load(tiny, "tiny", "eager", tasks=["t2v", "i2v"], keep_engines=2) as pipe:
        for task in ("t2v", "vc-uncached"):
            pipe.components.engine(pipe.graph(task))
        assert list(pipe.components._engines) == ["tiny", "tiny.vc-uncached"]


def test_the_callers_engine_is_not_counted_and_not_closed(bundle, fake_engine, monkeypatch):
    given, opened = fake_engine(), fake_engine()
    monkeypatch.setattr("lcexport.runtime.components.open_engine", lambda *words: opened)
    with load(bundle, "tiny", engine=given, keep_engines=1) as pipe:
        other = pipe.graph("t2v")
        job = other.job.model_copy(update={"task": "i2v"})
        assert pipe.components.engine(other.model_copy(update={"job": job})) is opened
        assert pipe.engine is given
    assert (given.closed, opened.closed) == (0, 1)


def test_no_engine_at_all_is_refused(bundle):
    with pytest.raises(UsageError, match="no engine may stay open; got 0"):
        load(bundle, "tiny", keep_engines=0, tasks=())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "needs the LoRA" in record.message]


@pytest.fixture
def distilled(bundle, fake_engine):
    """A pipeline, and `distilled(*names)` generates with LoRAs of these names in its manifest."""
    with load(bundle, "tiny", engine=fake_engine()) as pipe:

        def generate(*names):
            manifest = pipe.bundle.manifest
            loras = [LoraRecord(name=name, sha256="0" * 64, strength=1) for name in names]
            pipe.bundle.manifest = manifest.model_copy(update={"loras": tuple(loras)})
            pipe.generate("a cat", distill=True, steps=1, output="latents")

        yield generate


@pytest.mark.parametrize(("names", "named"), [((), "none"), (("style_lora",), "style_lora")])
def test_the_distilled_schedule_without_its_lora_is_one_warning(distilled, caplog, names, named):
    for _ in range(2):
        distilled(*names)
    (message,) = warnings_of(caplog)
    assert "the distilled schedule needs the LoRA cfg_step" in message
    assert f"the bundle names {named}:" in message


@pytest.mark.parametrize("name", ["cfg_step_lora", "cfg_step"])
def test_with_its_lora_nothing_is_said(distilled, caplog, name):
    with caplog.at_level(logging.WARNING):
        distilled("style", name)
    assert warnings_of(caplog) == []


def test_a_refinement_without_its_lora_is_one_warning(tiny, caplog):
    clip = np.zeros((13, 64, 96, 3), np.uint8)
    with load(tiny, "tiny", "eager", tasks=()) as pipe:
        for _ in range(2):
            pipe.refine(clip, spatial=True, steps=1, output="latents")
        (message,) = warnings_of(caplog)
        assert message.startswith("refinement needs the LoRA refinement in the weights")
        caplog.clear()
        lora = LoraRecord(name="refinement_lora", sha256="0" * 64, strength=1)
        manifest = pipe.bundle.manifest.model_copy(update={"loras": (lora,)})
        pipe.bundle.manifest = manifest
        pipe.components._warned.clear()
        pipe.refine(clip, spatial=True, steps=1, output="latents")
        assert warnings_of(caplog) == []
