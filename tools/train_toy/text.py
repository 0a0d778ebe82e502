"""The small tokenizer and UMT5 encoder, trained to tell what captions say.

The encoder learns to name each attribute of a scene from the mean of its tokens, "not said" being
an answer too. It stays as it is while the DiT is trained on its output.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tools.train_toy.training import Plan, Training, generator_at
from tools.train_toy.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    caption,
    choose,
    scenes,
)

SEED = 2
TEXT_TOKENS = 24
CAPTIONS = 4000  # the tokenizer counts the words of
RARE = -12.0  # log probability of a letter: far rarer than any word
PLAN = Plan(steps=600, rate=1e-3, warmup=50)
BATCH = 64
ATTRIBUTES: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "direction": list(DIRECTIONS),
    "speed": list(SPEEDS),
    "size": list(SIZES),
    "background": list(BACKGROUNDS),
}


def sample(generator: torch.Generator) -> tuple[Scene, str]:
    """A scene of the training data and a caption for it."""
    options = scenes(held=False)
    scene = options[choose(options, generator)]
    return scene, caption(scene, generator)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A piece for each word of the captions, and one for each printable character.

    The library's own trainer breaks such short texts into letters, and differently each time.
    """
    generator = generator_at(SEED, 0)
    counts = Counter(word for _ in range(CAPTIONS) for word in sample(generator)[1].split())
    total = counts.total()
    words = [(f"▁{word}", math.log(count / total)) for word, count in sorted(counts.items())]
    letters = [(piece, RARE) for piece in ("▁", *map(chr, range(33, 127)))]
    special = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces = dict([*special, *letters, *words])  # a word of one letter counts as a word
    tokenizer = Tokenizer(Unigram(list(pieces.items()), unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def new_encoder(vocabulary: int) -> UMT5EncoderModel:
    """The same first weights every time."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return UMT5EncoderModel(config)


class Naming(nn.Module):
    """The encoder, and a linear map for each attribute, which only the training needs."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            width = encoder.config.d_model
            self.heads = nn.ModuleDict(
                {name: nn.Linear(width, len(values) + 1) for name, values in ATTRIBUTES.items()}
            )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        """Logits per attribute; the last one is "not said"."""
        hidden = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        weight = mask_BL.unsqueeze(-1).float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return {name: head(mean) for name, head in self.heads.items()}


def said(scene: Scene, text: str, name: str) -> int:
    """The attribute's number, or the one after the last where the caption leaves it out."""
    value = getattr(scene, name)
    return ATTRIBUTES[name].index(value) if value in text.split() else len(ATTRIBUTES[name])


class TextReader:
    """Tokenizer and encoder, as the runtime uses them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, L]."""
        found: Any = self.tokenizer(
            texts,
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, C], those of padding too, and the mask [B, L]."""
        ids_BL, mask_BL = self.tokens(texts)
        found = self.encoder(input_ids=ids_BL, attention_mask=mask_BL)
        return found.last_hidden_state, mask_BL


def train_text(folder: Path, plan: Plan = PLAN) -> TextReader:
    """Train, or go on training, in `folder`."""
    tokenizer = train_tokenizer()
    naming = Naming(new_encoder(len(tokenizer)))
    reader = TextReader(tokenizer, naming.encoder)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = generator_at(SEED, 1, step)
        rows = [sample(generator) for _ in range(BATCH)]
        logits = naming(*reader.tokens([text for _, text in rows]))
        return {
            name: F.cross_entropy(
                logits[name], torch.tensor([said(scene, text, name) for scene, text in rows])
            )
            for name in ATTRIBUTES
        }

    Training(naming, plan, folder, "text").run(loss_at)
    naming.encoder.requires_grad_(False).eval()
    return reader
