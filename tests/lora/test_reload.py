"""Other weights under an open pipeline."""

import json

import pytest
import torch
from lora_files import LORA_A, SIZE

from lcexport.configs.errors import IntegrityError, UsageError
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import MANIFEST
from lcexport.lora import bake, choice_from, remove
from lcexport.runtime import load

OPTIONS = {"steps": 1, "seed": 3, "guidance_scale": 1, "output": "latents"}


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_pipeline_goes_on_with_what_was_baked(bundle, backend):
    with load(bundle, SIZE, backend) as pipe:
        base = pipe.generate("a cat", **OPTIONS)
        text, vae = pipe.components._text, pipe.components._vae
        bake(bundle, [choice_from(str(LORA_A))], golden=False)
        assert torch.equal(pipe.generate("a cat", **OPTIONS), base)  # until it is told
        pipe.reload_weights()
        found = pipe.generate("a cat", **OPTIONS)
        with load(bundle, SIZE, backend) as fresh:
            assert torch.equal(found, fresh.generate("a cat", **OPTIONS))
        assert not torch.equal(found, base)
        assert [record.name for record in pipe.bundle.manifest.loras] == ["lora_a"]
        remove(bundle, golden=False)
        pipe.reload_weights(check_hashes=True)
        assert torch.equal(pipe.generate("a cat", **OPTIONS), base)
        assert (pipe.components._text, pipe.components._vae) == (text, vae)


def test_more_than_the_weights_is_refused_and_changes_nothing(bundle):
    with load(bundle, SIZE, "eager") as pipe:
        wanted = pipe.generate("a cat", **OPTIONS)
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
        (bundle / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}')
        record = manifest["files"]["scheduler/scheduler_config.json"]
        path = bundle / "scheduler/scheduler_config.json"
        record |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(IntegrityError, match=r"more than the weights .*scheduler_config"):
            pipe.reload_weights()
        assert torch.equal(pipe.generate("a cat", **OPTIONS), wanted)


def test_an_engine_of_the_callers_is_not_replaced(bundle):
    with (
        load(bundle, SIZE, "eager") as owner,
        load(bundle, SIZE, engine=owner.engine) as pipe,
        pytest.raises(UsageError, match="handed in, and has the old weights"),
    ):
        pipe.reload_weights()


def test_a_closed_pipeline_reloads_nothing(bundle):
    with load(bundle, SIZE, "eager") as pipe:
        pass
    with pytest.raises(UsageError, match="closed"):
        pipe.reload_weights()
