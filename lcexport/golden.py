"""A bundle's golden data: inputs made from a seed, and the eager DiT's outputs for them.

Per branch of the guidance, cond and uncond: `text_*`, `mask_*`, `velocity_*`; shared by both:
`hidden_states` and `timestep`. Names and shapes are those of an engine's inputs.
"""

import torch
from safetensors.torch import load_file

from lcexport.configs.errors import InputError
from lcexport.engines import Engine
from lcexport.engines.bundle import Bundle, GraphRecord

SEED = 20_480
TIMESTEP = 752.0  # exact in bfloat16, so that rounding it is no difference
PROMPT_TOKENS = {"cond": 24, "uncond": 1}  # an empty prompt is its end-of-sequence token
BRANCHES = tuple(PROMPT_TOKENS)


def golden_inputs(engine: Engine | GraphRecord) -> dict[str, torch.Tensor]:
    """Latents and text features N(0, 1), padding masked as the tokenizer does; on the host."""
    shapes = {spec.name: spec.shape for spec in engine.inputs}
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        "hidden_states": torch.randn(shapes["hidden_states"], generator=generator),
        "timestep": torch.full(shapes["timestep"], TIMESTEP),
    }
    for branch, tokens in PROMPT_TOKENS.items():
        text = torch.randn(shapes["encoder_hidden_states"], generator=generator)
        mask = torch.zeros(shapes["encoder_attention_mask"], dtype=torch.bool)
        mask[:, :tokens] = True
        tensors |= {f"text_{branch}": text, f"mask_{branch}": mask}
    return tensors


def make_golden(engine: Engine) -> dict[str, torch.Tensor]:
    """The golden inputs with `engine`'s outputs; `engine` should be the eager one."""
    tensors = golden_inputs(engine)
    for branch in BRANCHES:
        tensors[f"velocity_{branch}"] = run_branch(engine, tensors, branch)
    return tensors


def run_branch(engine: Engine, golden: dict[str, torch.Tensor], branch: str) -> torch.Tensor:
    """The engine's velocity for one branch of the golden inputs, on the host."""
    return run_once(engine, branch_inputs(golden, branch))


def branch_inputs(golden: dict[str, torch.Tensor], branch: str) -> dict[str, torch.Tensor]:
    """One branch of the golden inputs under the engine's names."""
    return {
        "hidden_states": golden["hidden_states"],
        "encoder_hidden_states": golden[f"text_{branch}"],
        "timestep": golden["timestep"],
        "encoder_attention_mask": golden[f"mask_{branch}"],
    }


def run_once(engine: Engine, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One call with host tensors; the output comes back to the host."""
    spec = engine.outputs[0]
    output = torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
    placed = {name: tensor.to(engine.device).contiguous() for name, tensor in inputs.items()}
    engine.run(placed, {spec.name: output})
    return output.cpu()


def read_golden(bundle: Bundle, resolution: str) -> dict[str, torch.Tensor]:
    """The golden data of one resolution.

    Raises:
        InputError: the bundle was exported without golden data.
    """
    name = bundle.graph(resolution).golden
    if name is None:
        raise InputError(
            f"the bundle {bundle.folder} has no golden data for {resolution}",
            do="It was built with --only export; build it without.",
        )
    return load_file(bundle.path(name))
