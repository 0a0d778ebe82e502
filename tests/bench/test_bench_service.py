"""What one request of each task is."""

import pytest

from lcexport.bench import service
from lcexport.bench.service import PROMPT, opened, serve
from lcexport.configs.tasks import Task
from lcexport.engines.manifest import read_manifest
from lcexport.runtime import Pipeline
from lcexport.runtime.components import Components


@pytest.mark.parametrize("task", ["t2v", "i2v", "vc", "vc-uncached", "refine", "spatial-i2v"])
def test_every_task_can_be_served(task_bundle, task: Task, monkeypatch):
    steps: list[int] = []
    for name in ("generate", "refine"):
        real = getattr(Pipeline, name)

        def counting(self, *given, real=real, **options):
            steps.append(options["steps"])
            return real(self, *given, **options)

        monkeypatch.setattr(Pipeline, name, counting)
    resolution = next(iter(read_manifest(task_bundle).graphs.values())).preset.name
    got = serve(str(task_bundle), resolution, task, "eager", "cpu", 2, 1, 1, started=0.0)
    assert steps == [2, 2]
    assert ("cache" in got) == (task == "vc")
    for name in ("text", "decode", "requests"):
        assert got[name]["runs"] == 1  # pyright: ignore[reportIndexIssue]


def test_every_repeat_and_request_encodes_its_prompt(task_bundle, monkeypatch):
    """None is found among the texts that were encoded before: a repeat would measure nothing."""
    encoded: list[str] = []
    real = Components._encode

    def counting(self, prompts):
        encoded.extend(prompts)
        return real(self, prompts)

    monkeypatch.setattr(Components, "_encode", counting)
    resolution = next(iter(read_manifest(task_bundle).graphs.values())).preset.name
    repeats, requests = 3, 2
    serve(str(task_bundle), resolution, "t2v", "eager", "cpu", 1, repeats, requests, started=0.0)
    measured = [prompt for prompt in encoded if prompt.startswith(PROMPT)]
    assert len(measured) == len(set(measured)) == 1 + requests + repeats


@pytest.mark.parametrize("compiled", [True, False])
def test_text_encoder_and_vae_are_the_librarys_where_asked(compiled, monkeypatch):
    given = {}
    monkeypatch.setattr(service, "load", lambda *places, **options: given.update(options))
    opened("bundle", "480p", "t2v", "aotinductor", "cpu", compiled)
    assert given["compiled_components"] is compiled
