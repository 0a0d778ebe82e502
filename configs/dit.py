"""The DiT's configuration, read from the checkpoint's `config.json`."""

import json
from pathlib import Path
from typing import Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lcexport.configs.errors import InputError

FFN_MULTIPLE = 256


class BlockSparseParams(BaseModel):
    """`bsa_params`: block-sparse self-attention, which refinement may use.

    Attributes:
        sparsity: the share of key chunks left out; None only where there is a `cdf_threshold`.
        cdf_threshold: the share of the gate's softmax that the kept chunks may have together.
        chunk_3d_shape_q, chunk_3d_shape_k: frames, rows and columns of a chunk, in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float | None = Field(default=0.9375, ge=0, le=1)
    cdf_threshold: float | None = Field(default=None, gt=0, le=1)
    chunk_3d_shape_q: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 4, 4)
    chunk_3d_shape_k: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 4, 4)

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        if self.sparsity is None and self.cdf_threshold is None:
            raise ValueError("bsa_params has neither a sparsity nor a cdf_threshold")
        return self


class DiTConfig(BaseModel):
    """Sizes of a LongCat-Video DiT. The defaults are the released 13.6 B model's.

    Keys of the file that do not change the mathematics (attention kernels, context parallelism)
    are ignored. FastVideo's files say `num_attention_heads` for the original's `num_heads`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    in_channels: int = Field(default=16, ge=1)
    out_channels: int = Field(default=16, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    depth: int = Field(default=48, ge=1, validation_alias=AliasChoices("depth", "num_layers"))
    num_heads: int = Field(
        default=32, ge=1, validation_alias=AliasChoices("num_heads", "num_attention_heads")
    )
    caption_channels: int = Field(default=4096, ge=1)
    mlp_ratio: int = Field(default=4, ge=1)
    adaln_tembed_dim: int = Field(default=512, ge=1)
    frequency_embedding_size: int = Field(default=256, ge=2)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    # The class default of the original is false; the released file says true.
    text_tokens_zero_pad: bool = False
    # What block-sparse attention is to be like where it is used, not that it is used.
    bsa_params: BlockSparseParams | None = None
    # Whether every task uses it; the released file says false, and refinement turns it on.
    enable_bsa: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads")
        if self.head_dim % 2:
            raise ValueError(f"the head dimension {self.head_dim} is odd: RoPE turns pairs")
        if self.patch_size != (1, 2, 2):
            raise ValueError(f"patch_size {self.patch_size} is not (1, 2, 2)")
        return self

    @property
    def head_dim(self) -> int:
        """D, channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_hidden(self) -> int:
        """Width of the SwiGLU: two thirds of mlp_ratio * C, rounded up to a multiple of 256."""
        return -(-int(2 * self.mlp_ratio * self.hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE

    @property
    def patch_features(self) -> int:
        """Values in one patch: channels * 1 * 2 * 2, 64 for the released model."""
        return self.in_channels * 4

    @classmethod
    def keys(cls) -> list[str]:
        """Every key of `config.json` that is read, aliases included."""
        aliases = (field.validation_alias for field in cls.model_fields.values())
        choices = (a.choices for a in aliases if isinstance(a, AliasChoices))
        return [*cls.model_fields, *(str(c) for given in choices for c in given)]

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read `config.json`.

        Raises:
            InputError: the file is missing, is not JSON, or contradicts itself.
        """
        path = Path(path)
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path}: {where + ': ' if where else ''}{message}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from error
