"""Text encoder, tokenizer, VAE and scheduler: the files they are read from may be damaged.

A library that is handed a damaged file raises whatever it happens to trip over. Here that becomes
one InputError which names the folder, what was found and what to do.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from lcexport.configs.errors import InputError, LcexportError

DOWNLOAD_AGAIN = "Download that folder again; `lcexport validate` checks a checkpoint's."
MAX_LAYERS = 1000  # a configuration that claims more is damaged, and building it would not end
LAYER_COUNTS = ("num_layers", "num_res_blocks")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a component's configuration file.

    Raises:
        InputError: it is missing, unreadable, no JSON object, or claims an absurd depth.
    """
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", do=DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", do=DOWNLOAD_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", do=DOWNLOAD_AGAIN) from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object", got=str(config)[:80], do=DOWNLOAD_AGAIN)
    for key in LAYER_COUNTS:
        if isinstance(count := config.get(key), int) and count > MAX_LAYERS:
            raise InputError(
                f"{path}: {key} is absurd", got=count, wanted=f"at most {MAX_LAYERS}",
                do=DOWNLOAD_AGAIN,
            )  # fmt: skip
    return config


def is_finite_number(value: object) -> TypeGuard[float]:
    """JSON knows true, and Python's reader NaN and infinity too: none of them is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


@contextmanager
def library_errors(what: str, where: Path, do: str = DOWNLOAD_AGAIN) -> Iterator[None]:
    """Whatever a library raises over the files in `where`, or that file, becomes an InputError."""
    try:
        yield
    except (LcexportError, MemoryError):
        raise
    except Exception as error:  # KeyError, TypeError, RuntimeError: whatever it tripped over
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"no usable {what} in {where}",
            got=f"{type(error).__name__}: {reason}",
            do=do,
        ) from error


def refuse_missing(what: str, folder: Path, missing: list[str]) -> None:
    """The libraries leave random numbers in what a file lacks, and only log it."""
    if missing:
        raise InputError(
            f"the {what} in {folder} lacks weights",
            got=f"no {', '.join(sorted(missing)[:3])}",
            wanted="every weight its config.json calls for",
            do=DOWNLOAD_AGAIN,
        )
