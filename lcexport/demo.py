"""Small but complete checkpoints in the released layout, to try all of this with.

`toy` is trained: it shows one coloured shape that moves, as its prompt says; `toy/README.md` is its
model card. The others' weights are random: `demo`, whose videos are textures, and `bench`, whose
matrices are large enough to keep a processor busy.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lcexport import __version__
from lcexport.checkpoint import copy_folder, expected_tensors
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import LockedError, ResourceError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.engines.files import resource_errors
from lcexport.engines.folders import cache_folder, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5Config

SEED = 7
CONFIG = DiTConfig(
    hidden_size=256,
    depth=4,
    num_heads=2,
    caption_channels=64,
    adaln_tembed_dim=64,
    text_tokens_zero_pad=True,
)


@dataclass(frozen=True)
class Sibling:
    """A checkpoint's DiT, its VAE's base channels, and what the whole of it takes on the disk."""

    config: DiTConfig
    vae_channels: int
    megabytes: int


SIBLINGS: dict[str, Sibling] = {
    "demo": Sibling(CONFIG, 16, 25),
    "bench": Sibling(
        CONFIG.model_copy(update={"hidden_size": 1024, "num_heads": 8, "adaln_tembed_dim": 256}),
        vae_channels=4,  # narrow: decoding 29 frames is to take seconds
        megabytes=330,
    ),
}
TOY = Path(__file__).parent / "toy"
TOY_DIGESTS = "SHA256SUMS"  # of its files
TOY_PRESET = "toy"
SHARDS = 2
SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = "▁ " + "".join(chr(code) for code in range(33, 127))


def make_demo_checkpoint(folder: Path, size: str = "demo") -> None:
    """Write the checkpoint to `folder`, which must be free; the same bytes every time.

    Raises:
        UsageError: the folder has no name of its own, or no such size.
        ResourceError: the folder is taken, or cannot be written.
    """
    sizes = ["toy", *SIBLINGS]
    if size not in sizes:
        wanted = " or ".join(sizes)
        raise UsageError("no such size of checkpoint", got=repr(size), wanted=wanted)
    with resource_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        if size == "toy":
            copy_folder(TOY, temporary)
            return
        try:
            write_sibling(temporary, SIBLINGS[size])
        except SafetensorError as error:  # how the library that writes weights says "disk full"
            raise ResourceError(
                f"cannot write {folder}", got=error,
                wanted=f"about {SIBLINGS[size].megabytes} MB of free disk",
                do="Free some space or choose another disk.",
            ) from error  # fmt: skip


def write_sibling(folder: Path, sibling: Sibling) -> None:
    """Every component, its weights random and the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        write_dit(folder / "dit", sibling.config, random_weights(sibling.config))
        write_text_encoder(folder / "text_encoder")
        write_tokenizer(folder / "tokenizer")
        write_vae(folder / "vae", sibling.vae_channels)
        write_scheduler(folder / "scheduler")


def toy_bundle() -> Path:
    """The toy's bundle for text, images and continuation, made once in the user's cache folder.

    $XDG_CACHE_HOME/lcexport, or ~/.cache/lcexport. Another toy's, or preset's, has another name.

    Raises:
        LockedError: another process is making it.
        LcexportError: it cannot be built there.
    """
    from lcexport.builder import BuildOptions, build
    from lcexport.builder.staging import staging_folder

    preset = preset_from(TOY_PRESET)
    made_of = (TOY / TOY_DIGESTS).read_bytes() + preset.model_dump_json().encode()
    name = hashlib.sha256(made_of).hexdigest()[:12]
    output = cache_folder("toy") / f"{__version__}-{name}"
    if output.exists():
        return output
    options = BuildOptions(
        model=TOY,
        output=output,
        presets=(preset,),
        tasks=("t2v", "i2v", "vc"),
        cond_frames=5,
        resume=staging_folder(output).exists(),  # what a killed one left
    )
    try:
        build(options)
    except LockedError as error:
        raise LockedError(
            f"another process is making the demo's bundle, {output}", do="Try again in a minute."
        ) from error
    return output


def random_weights(dit: DiTConfig) -> dict[str, torch.Tensor]:
    """By their original names, float32."""
    names = expected_tensors(dit, "original")
    return {name: random_weight(name, shape) for name, shape in names.items()}


def write_dit(folder: Path, dit: DiTConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Original names, in shards with an index, as released."""
    folder.mkdir()
    config = {
        "_class_name": "LongCatVideoTransformer3DModel",
        **dit.model_dump(mode="json"),
        "enable_bsa": False,
        "bsa_params": None,
        "cp_split_hw": None,
    }
    write_json(folder / "config.json", config)
    names = list(tensors)
    share = math.ceil(len(names) / SHARDS)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard * share : (shard + 1) * share]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Norm weights near one, biases near zero, matrices that keep the variance."""
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * torch.randn(shape)
    if len(shape) == 1:
        return 0.02 * torch.randn(shape)
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def write_text_encoder(folder: Path) -> None:
    """A UMT5 encoder of two layers."""
    from transformers import UMT5EncoderModel

    from lcexport.runtime.text import no_progress_bar

    vocabulary = len(SPECIAL) + len(PIECES)
    with no_progress_bar():
        encoder = UMT5EncoderModel(umt5_config(vocabulary, CONFIG.caption_channels, inner=96))
        encoder.save_pretrained(folder)


def umt5_config(vocabulary: int, width: int, inner: int) -> "UMT5Config":
    """Of an encoder of two layers, whose feed-forward is `inner` wide."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // 4,
        d_ff=inner,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )


def write_tokenizer(folder: Path) -> None:
    """One token per printable character."""
    fast_tokenizer(dict.fromkeys(PIECES, -1.0)).save_pretrained(folder)


def fast_tokenizer(pieces: Mapping[str, float]) -> "PreTrainedTokenizerFast":
    """Of T5's special tokens and these pieces, each with the logarithm of its probability."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    scores = dict.fromkeys(SPECIAL, 0.0) | dict(pieces)
    tokenizer = Tokenizer(Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_vae(folder: Path, channels: int) -> None:
    """A Wan VAE of so many base channels with the released strides: 8 x 8 pixels, 4 frames."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=channels,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    vae.save_pretrained(folder)


def write_scheduler(folder: Path) -> None:
    """The released schedule: flow matching, shift 12."""
    folder.mkdir()
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 12.0,
        "use_dynamic_shifting": False,
    }
    write_json(folder / "scheduler_config.json", config)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
