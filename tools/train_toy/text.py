"""The small tokenizer and UMT5 encoder, trained to tell what captions say.

The encoder learns to name each attribute of a scene from the mean of its tokens, "not said" being
an answer too. It stays as it is while the DiT is trained on its output.
"""

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from lcexport.demo import fast_tokenizer, umt5_config
from tools.train_toy.training import Plan, Training, generator_at
from tools.train_toy.world import ATTRIBUTES, Scene, caption, choose, scenes

SEED = 2
TEXT_TOKENS = 24
CAPTIONS = 4000  # the tokenizer counts the words of
RARE = -12.0  # log probability of a letter: far rarer than any word
PLAN = Plan(steps=600, rate=1e-3, warmup=50)
BATCH = 64


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
    words = {f"▁{word}": math.log(count / total) for word, count in sorted(counts.items())}
    letters = dict.fromkeys(("▁", *map(chr, range(33, 127))), RARE)
    return fast_tokenizer(letters | words)  # a word of one letter counts as a word


def new_encoder(vocabulary: int) -> UMT5EncoderModel:
    """The same first weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return UMT5EncoderModel(umt5_config(vocabulary, width=128, inner=256))


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


def loss_at(naming: Naming, reader: TextReader, step: int) -> dict[str, Tensor]:
    """Cross entropy of each attribute."""
    generator = generator_at(SEED, 1, step)
    rows = [sample(generator) for _ in range(BATCH)]
    logits = naming(*reader.tokens([text for _, text in rows]))
    return {
        name: F.cross_entropy(
            logits[name], torch.tensor([said(scene, text, name) for scene, text in rows])
        )
        for name in ATTRIBUTES
    }


def train_text(folder: Path, plan: Plan = PLAN) -> TextReader:
    """Train, or go on training, in `folder`."""
    tokenizer = train_tokenizer()
    naming = Naming(new_encoder(len(tokenizer)))
    reader = TextReader(tokenizer, naming.encoder)
    Training(naming, plan, folder, "text").run(partial(loss_at, naming, reader))
    naming.encoder.requires_grad_(False).eval()
    return reader
