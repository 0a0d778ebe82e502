"""Prompts to embeddings: cleaning, the tokenizer and the UMT5 encoder. Local files only.

B prompts, L tokens (padding included), C the encoder's width.
"""

import html
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.runtime.decoding import Package
from lcexport.runtime.loading import DOWNLOAD_AGAIN, library_errors, read_config, refuse_missing

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

log = logging.getLogger(__name__)

MAX_PROMPT_CHARACTERS = 100_000
KEPT_TEXTS = 16  # 8 MB each for the released encoder


@dataclass(frozen=True)
class Text:
    """Encoded prompts: embeds float32 [B, 1, L, C], mask bool [B, L], True on real tokens.

    Rows of padding keep what the encoder gave for them; the DiT does its own masking.
    """

    embeds: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> "Text":
        return Text(self.embeds.to(device), self.mask.to(device))


class TextCache:
    """What was encoded of late, by the prompt's own text; the one used longest ago goes first.

    A service's negative prompt is the same again and again, and with `offload="release"` the
    encoder need not even be loaded for it.
    """

    def __init__(self, size: int = KEPT_TEXTS) -> None:
        self._size = size
        self._rows: dict[str, Text] = {}  # the one used last is the last one

    def rows(self, prompts: list[str], encode: Callable[[list[str]], Text]) -> Text:
        """One row per prompt; `encode` is called once at most, with those that are not here.

        Raises:
            UsageError: a prompt is no text.
        """
        for prompt in prompts:
            check_prompt(prompt)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        found = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        if missing:
            made = encode(missing)
            # copies: a part of a tensor keeps all of it in memory
            rows = ((row.clone() for row in x.split(1)) for x in (made.embeds, made.mask))
            split = zip(*rows, strict=True)
            found |= zip(missing, (Text(*row) for row in split), strict=True)
        for prompt in prompts:
            self._rows.pop(prompt, None)
            self._rows[prompt] = found[prompt]
        for prompt in list(self._rows)[: -self._size]:
            del self._rows[prompt]
        rows = [found[prompt] for prompt in prompts]
        return Text(torch.cat([r.embeds for r in rows]), torch.cat([r.mask for r in rows]))


class TextEncoder:
    """The tokenizer and UMT5 encoder of one bundle.

    Args:
        folder: holds `text_encoder/` and `tokenizer/`.
        text_tokens: L, the length every prompt is padded or cut to.
        dtype: what the encoder computes in; its output is widened to float32.
        device: where the encoder lives.
        package: the compiled encoder of that length; the library's where None.

    Raises:
        InputError: a file is missing, or the weights do not fit the configuration.
        IntegrityError: the package was compiled for other weights.
    """

    def __init__(
        self,
        folder: str | Path,
        text_tokens: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        package: Package | None = None,
    ) -> None:
        folder = Path(folder)
        self.text_tokens, self._package = text_tokens, package
        self._tokenizer = load_tokenizer(folder / "tokenizer")
        model = load_umt5(folder / "text_encoder", dtype, device)
        if package is not None:
            package.check(model)
        self._model: UMT5EncoderModel | None = model

    def encode(self, prompts: list[str]) -> Text:
        """Clean, tokenise and encode `prompts`; the result is on the encoder's device.

        One prompt at a time, so that a prompt's embedding does not depend on its neighbours,
        and each different text only once.
        """
        once = {text: self._encode_one(text) for text in map(clean_prompt, prompts)}
        rows = [once[clean_prompt(prompt)] for prompt in prompts]
        return Text(torch.cat([r.embeds for r in rows]), torch.cat([r.mask for r in rows]))

    def encode_ids(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> Text:
        """Encode token ids, padding included; mask is nonzero on real tokens.

        Raises:
            VerificationError: the embeddings hold NaN or infinity.
        """
        model = self._opened()
        ids_BL, mask_BL = ids_BL.to(model.device), mask_BL.to(model.device)
        with torch.no_grad():
            if self._package is not None:
                (hidden_BLC,) = self._package(model, ids_BL, mask_BL.bool())
            else:
                found = model(input_ids=ids_BL, attention_mask=mask_BL.long())
                hidden_BLC = found.last_hidden_state
        if not torch.isfinite(hidden_BLC).all():
            raise VerificationError(
                "the text encoder gave numbers that are not finite",
                do="Run `lcexport validate` on the checkpoint: it scans the encoder's weights.",
            )
        return Text(hidden_BLC.float().unsqueeze(1), mask_BL.bool())

    def by(self, package: Package | None) -> "TextEncoder":
        """The same one, same weights, with another package; None for the library's encoder."""
        if package is not None:
            package.check(self._opened())
        other = copy(self)
        other._package = package
        return other

    def to(self, device: torch.device | str) -> "TextEncoder":
        # the library's stubs take `Module.to` for a function without arguments
        torch.nn.Module.to(self._opened(), torch.device(device))
        return self

    def close(self) -> None:
        """Drop the weights. Harmless when called twice."""
        self._model = None

    def _opened(self) -> "UMT5EncoderModel":
        if self._model is None:
            raise UsageError("the text encoder is closed")
        return self._model

    def tokens(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [1, L] of a text, padded or cut, and their mask, nonzero on real tokens."""
        tokens = self._tokenizer(
            [text],
            padding="max_length",
            max_length=self.text_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def _encode_one(self, text: str) -> Text:
        self._warn_if_cut(text)
        return self.encode_ids(*self.tokens(text))

    def _warn_if_cut(self, text: str) -> None:
        # `verbose=False` keeps the tokenizer's own, less precise warning back.
        used = len(self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        if used > self.text_tokens:
            log.warning(
                "a prompt has %d tokens: the first %d are used, the rest is ignored",
                used,
                self.text_tokens,
            )


def clean_prompt(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes (two layers), collapse white space.

    Raises:
        UsageError: not a string, or over 100,000 characters.
    """
    import ftfy

    check_prompt(text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def check_prompt(text: object) -> None:
    """UsageError: not a string, or over 100,000 characters."""
    if not isinstance(text, str):
        raise UsageError("a prompt is not text", got=type(text).__name__, wanted="str")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            "the prompt is too long",
            got=f"{len(text)} characters",
            wanted=f"at most {MAX_PROMPT_CHARACTERS}",
            do="The model reads 512 tokens, about 2,000 characters.",
        )


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal; its switch is global and is put back."""
    from transformers.utils import logging as switch

    drawn = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            switch.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, tried on one prompt.

    Raises:
        InputError: a file is missing or damaged, or the tokenizer cannot pad.
    """
    from transformers import AutoTokenizer

    with library_errors("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer("a cat")["input_ids"]
    if not ids or tokenizer.pad_token is None:
        raise InputError(
            f"the tokenizer in {folder} does not tokenise",
            got=f"{len(ids)} tokens for 'a cat', padding token {tokenizer.pad_token}",
            wanted="some tokens, and a padding token",
            do=DOWNLOAD_AGAIN,
        )
    return tokenizer


def load_umt5(folder: Path, dtype: torch.dtype, device: torch.device | str) -> "UMT5EncoderModel":
    from transformers import UMT5EncoderModel

    read: Any = UMT5EncoderModel.from_pretrained
    with library_errors("text encoder", folder), no_progress_bar():
        model, report = read(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    refuse_missing("text encoder", folder, report["missing_keys"])
    return model.to(device).eval().requires_grad_(False)


def umt5_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each weight that the encoder's `config.json` calls for. Reads no weight.

    Raises:
        InputError: the configuration is missing or no UMT5's.
    """
    with torch.device("meta"):
        model = empty_umt5(folder)
        # Views of another weight under a second name: a file need not hold them.
        tied: Any = model._tied_weights_keys or {}
        weights = model.state_dict()
    return {name: tuple(value.shape) for name, value in weights.items() if name not in tied}


def empty_umt5(folder: Path) -> "UMT5EncoderModel":
    """The encoder of a `config.json`, its weights whatever the caller's device makes of them.

    Raises:
        InputError: as `umt5_shapes`.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    config = read_config(folder / "config.json")
    with library_errors("text encoder", folder):
        return UMT5EncoderModel(UMT5Config.from_dict(config))
