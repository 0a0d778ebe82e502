"""Fixtures: a ten-line engine, a toy tokenizer, and a bundle made of the golden weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import Preset
from lcexport.configs.tasks import Task, jobs_for
from lcexport.engines import TensorSpec
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import (
    MANIFEST,
    FileRecord,
    GraphRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
)

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENS, WIDTH = 12, 64  # of the golden text encoder
TINY_TASKS: tuple[Task, ...] = (
    *("t2v", "i2v", "vc", "vc-uncached"),
    *("refine", "spatial", "refine-i2v", "refine-vc", "spatial-vc"),
)


class FakeEngine:
    """A velocity that depends on every input, row by row; remembers what it was given."""

    backend = "fake"
    device = torch.device("cpu")

    def __init__(self, batch: int = 1, latents: tuple[int, ...] = (16, 3, 8, 12)) -> None:
        shapes = {
            "hidden_states": (latents, torch.float32),
            "encoder_hidden_states": ((1, TOKENS, WIDTH), torch.float32),
            "timestep": (latents[1:2], torch.float32),
            "encoder_attention_mask": ((TOKENS,), torch.bool),
        }
        self.inputs = tuple(TensorSpec(n, (batch, *s), d) for n, (s, d) in shapes.items())
        self.outputs = (TensorSpec("velocity", (batch, *latents), torch.float32),)
        self.calls: list[dict[str, torch.Tensor]] = []
        self.addresses: set[tuple[int, ...]] = set()
        self.closed = 0

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        for spec in self.inputs:
            spec.check(inputs[spec.name])
        self.calls.append({name: tensor.clone() for name, tensor in inputs.items()})
        self.addresses.add(tuple(t.data_ptr() for t in (*inputs.values(), *outputs.values())))
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        tone = (text.sum(-1) * mask[:, None]).mean((1, 2))[:, None, None, None, None]
        time = inputs["timestep"][:, None, :, None, None] / 1000
        outputs["velocity"].copy_(torch.tanh(inputs["hidden_states"] + tone) - 0.3 * time * tone)

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture(scope="session")
def fake_engine() -> Callable[..., FakeEngine]:
    return FakeEngine


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_encoder/` with the golden UMT5, `tokenizer/` with twenty words."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text_encoder").mkdir()
    case = GOLDEN / "text"
    config = json.loads((case / "umt5_config.json").read_text("utf-8"))
    config |= {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    shutil.copy(case / "text_encoder.safetensors", folder / "text_encoder/model.safetensors")
    save_tokenizer(folder / "tokenizer")
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["a", "cat", "dog", "plays", "the", "piano", "drums", "of", "rain", "blurry"]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vae/` with the golden weights, its configuration complete as a released one's."""
    folder = tmp_path_factory.mktemp("vae")
    (folder / "vae").mkdir()
    config, meta = (
        json.loads((GOLDEN / "vae_tiny" / name).read_text("utf-8"))
        for name in ("config.json", "meta.json")
    )
    config |= {name: meta[name] for name in ("latents_mean", "latents_std")}
    (folder / "vae/config.json").write_text(json.dumps(config))
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(GOLDEN / "vae_tiny/vae.safetensors", weights)
    return folder


@pytest.fixture(scope="session")
def checkpoint(
    dit_folder: Path,
    text_folder: Path,
    vae_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The golden DiT, text encoder and VAE in the released layout."""
    folder = tmp_path_factory.mktemp("golden") / "model"
    shutil.copytree(text_folder, folder)
    shutil.copytree(dit_folder, folder / "dit")
    shutil.copytree(vae_folder / "vae", folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"shift": 12.0}')
    config = json.loads((folder / "dit/config.json").read_text("utf-8"))
    config["text_tokens_zero_pad"] = True
    (folder / "dit/config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of it for nearly every task at 64x96x13, exported only. Read only."""
    preset = Preset(name="tiny", frames=13, height=64, width=96, text_tokens=TOKENS, steps=2)
    options = BuildOptions(
        model=checkpoint,
        output=tmp_path_factory.mktemp("bundles") / "tiny",
        presets=(preset,),
        tasks=TINY_TASKS,
        cond_frames=5,
        refine_size=(64, 128),
        only="export",
    )
    return build(options).folder


@pytest.fixture(scope="session")
def make_bundle(text_folder: Path, vae_folder: Path) -> Callable[..., Path]:
    """`make_bundle(folder, precision=..., shift=..., ...)` writes a bundle without a DiT."""

    def make(folder: Path, precision: str = "fp32", scheduler: str = '{"shift": 12.0}') -> Path:
        shutil.copytree(text_folder, folder)
        shutil.copytree(vae_folder / "vae", folder / "vae")
        (folder / "scheduler").mkdir()
        (folder / "scheduler/scheduler_config.json").write_text(scheduler)
        (folder / MANIFEST).write_text(manifest(folder, precision).model_dump_json())
        return folder

    return make


def manifest(folder: Path, precision: str) -> Manifest:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    records = {
        path.relative_to(folder).as_posix(): FileRecord(
            bytes=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in files
    }
    return Manifest.model_validate(
        {
            "name": "tiny",
            "created": "2025-01-01T00:00:00Z",
            "source": SourceRecord(layout="test", dtype="float32", tensors=1, tensors_sha256=""),
            "precision": precision,
            "islands": "checkpoint",
            "backends": ("fake",),
            "graphs": {"tiny": graph()},
            "files": records,
            "versions": {},
            "device": "cpu",
            "effective": {},
            "stages": (),
        }
    )


def graph() -> GraphRecord:
    engine = FakeEngine()
    preset = Preset(name="tiny", height=64, width=96, frames=9, fps=8, text_tokens=TOKENS, steps=3)
    inputs, outputs = (
        tuple(TensorRecord(name=s.name, shape=s.shape, dtype=str(s.dtype)[6:]) for s in specs)
        for specs in (engine.inputs, engine.outputs)
    )
    return GraphRecord(
        file="dit.tiny.onnx",
        job=jobs_for(preset, "t2v")[0],
        batch=1,
        inputs=inputs,
        outputs=outputs,
        precision_proof={},
    )


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def recorded() -> SimpleNamespace:
    """A callback that keeps its events: pass `recorded.add`, read `recorded.events`."""
    events: list[object] = []
    return SimpleNamespace(events=events, add=events.append)
