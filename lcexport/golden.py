"""A bundle's golden data: inputs made from a seed, and the eager DiT's outputs for them.

Shared by the branches of the guidance: `hidden_states` and `timestep`. Per branch, cond and uncond:
`text_*`, `mask_*`, `velocity_*`. A graph that makes a key/value cache has one branch and no text,
and of its outputs the first and the last layer's are kept. Names and shapes are an engine's.

A cache as an input is as large as the weights of several layers, so it is not stored: it is drawn
again from the seed.
"""

from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import load_file

from lcexport.configs.errors import InputError
from lcexport.engines import Engine, TensorSpec, is_cached
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import GraphRecord, TensorRecord

SEED = 20_480
TIMESTEP = 752.0  # exact in bfloat16, so that rounding it is no difference
PROMPT_TOKENS = {"cond": 24, "uncond": 1}  # an empty prompt is its end-of-sequence token
BRANCHES = tuple(PROMPT_TOKENS)
OFFSET = 128  # elements between one layer's cache and the next: engines want aligned addresses

Specs = Sequence[TensorSpec | TensorRecord]


def golden_inputs(engine: Engine | GraphRecord, clean: int = 0) -> dict[str, torch.Tensor]:
    """Latents and text features N(0, 1), padding masked as the tokenizer does; on the host.

    The first `clean` latent frames have timestep 0. A cache is part of it.
    """
    shapes = {spec.name: spec.shape for spec in engine.inputs}
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        "hidden_states": torch.randn(shapes["hidden_states"], generator=generator),
        "timestep": torch.full(shapes["timestep"], TIMESTEP),
    }
    tensors["timestep"][:, :clean] = 0
    if "encoder_hidden_states" in shapes:
        for branch, tokens in PROMPT_TOKENS.items():
            text = torch.randn(shapes["encoder_hidden_states"], generator=generator)
            mask = torch.zeros(shapes["encoder_attention_mask"], dtype=torch.bool)
            mask[:, :tokens] = True
            tensors |= {f"text_{branch}": text, f"mask_{branch}": mask}
    return tensors | golden_cache(engine.inputs)


def golden_cache(inputs: Specs) -> dict[str, torch.Tensor]:
    """N(0, 1) for every key/value input: views of one buffer, each a little further along it."""
    specs = [spec for spec in inputs if is_cached(spec.name)]
    if not specs:
        return {}
    shape, count = specs[0].shape, torch.Size(specs[0].shape).numel()
    dtype = specs[0].dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    generator = torch.Generator().manual_seed(SEED)
    buffer = torch.randn(count + OFFSET * len(specs), generator=generator).to(dtype)
    return {
        spec.name: buffer[OFFSET * i : OFFSET * i + count].view(shape)
        for i, spec in enumerate(specs)
    }


def make_golden(engine: Engine, clean: int = 0) -> dict[str, torch.Tensor]:
    """The golden inputs with `engine`'s outputs; `engine` should be the eager one."""
    tensors = golden_inputs(engine, clean)
    for branch in branches(tensors):
        made = run_all(engine, branch_inputs(tensors, branch))
        tensors |= {f"{name}_{branch}": made[name] for name in kept(engine.outputs)}
    return {name: tensor for name, tensor in tensors.items() if not stored_nowhere(name)}


def stored_nowhere(name: str) -> bool:
    """Whether a golden tensor is an input that is drawn again when it is needed."""
    return is_cached(name) and not name.endswith(("_cond", "_uncond"))


def kept(outputs: Specs) -> list[str]:
    """The outputs that are stored: the velocity, or the cache of the first and the last layer."""
    names = [spec.name for spec in outputs]
    return names if len(names) <= 4 else [*names[:2], *names[-2:]]


def branches(golden: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The branches of the guidance that golden data has; one where there is no text."""
    return tuple(name for name in BRANCHES if f"text_{name}" in golden) or ("cond",)


def against_golden(
    engine: Engine, golden: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what it is, the engine's, the stored one) for every stored output; one call per branch."""
    for branch in branches(golden):
        made = run_all(engine, branch_inputs(golden, branch))
        for name in kept(engine.outputs):
            yield f"{name} {branch}", made[name], golden[f"{name}_{branch}"]


def run_branch(engine: Engine, golden: dict[str, torch.Tensor], branch: str) -> torch.Tensor:
    """The engine's first output for one branch of the golden inputs, on the host."""
    return run_once(engine, branch_inputs(golden, branch))


def branch_inputs(golden: dict[str, torch.Tensor], branch: str) -> dict[str, torch.Tensor]:
    """One branch of the golden inputs under the engine's names."""
    inputs = {name: golden[name] for name in golden if stored_nowhere(name)}
    inputs |= {name: golden[name] for name in ("hidden_states", "timestep")}
    if f"text_{branch}" in golden:
        inputs["encoder_hidden_states"] = golden[f"text_{branch}"]
        inputs["encoder_attention_mask"] = golden[f"mask_{branch}"]
    return inputs


def run_once(engine: Engine, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One call with host tensors; the first output comes back to the host."""
    return run_all(engine, inputs)[engine.outputs[0].name]


def run_all(engine: Engine, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One call with host tensors; the outputs worth keeping come back to the host."""
    outputs = {
        spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
        for spec in engine.outputs
    }
    placed = {name: tensor.to(engine.device).contiguous() for name, tensor in inputs.items()}
    engine.run(placed, outputs)
    return {name: outputs[name].cpu() for name in kept(engine.outputs)}


def read_golden(bundle: Bundle, graph: str) -> dict[str, torch.Tensor]:
    """The golden data of one graph, a cache included.

    Raises:
        InputError: the bundle was exported without golden data.
    """
    record = bundle.graph(graph)
    if record.golden is None:
        raise InputError(
            f"the bundle {bundle.folder} has no golden data for {graph}",
            do="LoRAs were baked in with --no-golden: bake them without."
            if bundle.manifest.baked
            else "It was built with --only export; build it without.",
        )
    return load_file(bundle.path(record.golden)) | golden_cache(record.inputs)
