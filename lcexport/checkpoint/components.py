"""The components beside the DiT, checked as the runtime's own loaders will read them.

The networks are built without memory from their configurations, and their tensors compared by
name, shape and dtype with the files' headers; the tokenizer is small and really loaded. No weight
is read: NaN is found where all of them pass by, in `validate`'s scan and while they are copied.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lcexport.checkpoint.checks import dtype_problems, missing_problems, shape_problems
from lcexport.checkpoint.folders import component_files
from lcexport.checkpoint.layout import Checkpoint
from lcexport.checkpoint.shards import Weights, read_weights
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError
from lcexport.engines.header import read_header
from lcexport.engines.manifest import COMPONENTS
from lcexport.runtime.checks import read_shift
from lcexport.runtime.loading import DOWNLOAD_AGAIN
from lcexport.runtime.text import load_tokenizer, umt5_shapes
from lcexport.runtime.vae import vae_shapes

# Component -> the name its library looks for, before `.safetensors` or the index's ending.
WEIGHT_FILES = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}
Shapes = Mapping[str, tuple[int, ...]]


def check_components(checkpoint: Checkpoint, *, required: Iterable[str] = ()) -> None:
    """Require the components that are there to be sound, and the `required` ones to be there.

    Raises:
        InputError: the first thing that is missing or damaged.
    """
    missing = [name for name in required if name not in checkpoint.components]
    if missing:
        raise InputError(
            f"the checkpoint {checkpoint.folder} has no {', '.join(missing)}",
            wanted=f"folders {', '.join(COMPONENTS)} beside the DiT",
            do="Complete the download, or export the DiT alone with --only export.",
        )
    for error in component_errors(checkpoint.components, checkpoint.config):
        raise error


def component_errors(components: Mapping[str, Path], config: DiTConfig | None) -> list[InputError]:
    """Everything wrong with the components that are there; `config` is the DiT's, where known."""
    errors: list[InputError] = []
    for name, folder in components.items():
        try:
            component_files(folder)  # no link to nothing, nothing that is no file
            errors += CHECKS[name](folder)
        except InputError as error:
            errors.append(error)
    if not errors and {"text_encoder", "tokenizer"} <= components.keys():
        errors += text_errors(components["text_encoder"], components["tokenizer"], config)
    return errors


def component_weights(name: str, folder: Path, errors: list[InputError]) -> Weights:
    """The headers of a component's weights; nothing for one that has none."""
    stem = WEIGHT_FILES.get(name)
    return read_weights(folder, errors, stem) if stem else Weights()


def text_encoder_errors(folder: Path) -> list[InputError]:
    return weights_errors("text_encoder", folder, umt5_shapes(folder))


def vae_errors(folder: Path) -> list[InputError]:
    return weights_errors("vae", folder, vae_shapes(folder))


def tokenizer_errors(folder: Path) -> list[InputError]:
    load_tokenizer(folder)
    return []


def scheduler_errors(folder: Path) -> list[InputError]:
    read_shift(folder / "scheduler_config.json")
    return []


CHECKS: dict[str, Callable[[Path], list[InputError]]] = {
    "text_encoder": text_encoder_errors,
    "tokenizer": tokenizer_errors,
    "vae": vae_errors,
    "scheduler": scheduler_errors,
}


def weights_errors(name: str, folder: Path, shapes: Shapes) -> list[InputError]:
    """The weights hold every tensor the network has; others play no part, as with its loader."""
    errors: list[InputError] = []
    for path in component_files(folder):
        if path.suffix == ".safetensors":
            try:
                read_header(path)
            except InputError as error:
                errors.append(error)
    if errors:
        return errors
    weights = component_weights(name, folder, errors)
    if errors:
        return errors
    used = {name: weights.tensors[name] for name in shapes if name in weights.tensors}
    problems = missing_problems(folder, set(shapes) - set(used))
    problems += shape_problems(shapes, used) + dtype_problems(used)
    return [InputError(f"{folder}: {problem}", do=DOWNLOAD_AGAIN) for problem in problems]


def text_errors(encoder: Path, tokenizer: Path, config: DiTConfig | None) -> list[InputError]:
    """Tokenizer, encoder and DiT fit one another."""
    vocabulary, width = umt5_shapes(encoder)["shared.weight"]
    tokens = len(load_tokenizer(tokenizer))
    errors = []
    if tokens > vocabulary:
        what = f"{tokenizer} has more tokens than {encoder} knows"
        errors.append(InputError(what, got=tokens, wanted=vocabulary, do=DOWNLOAD_AGAIN))
    if config and width != (wanted := config.caption_channels):
        what = f"{encoder} does not fit the DiT: its features have another width"
        errors.append(InputError(what, got=width, wanted=wanted, do=DOWNLOAD_AGAIN))
    return errors
