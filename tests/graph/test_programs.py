"""The parts as torch programs: the eager modules, with their weights handed in."""

import pytest
import torch
from safetensors.torch import load_file

from lcexport.checkpoint import open_checkpoint, write_native
from lcexport.configs.errors import BuildError
from lcexport.dit import Geometry, dit_from_tensors
from lcexport.graph import GraphSpec
from lcexport.graph.modules import (
    BlockPart,
    CacheBlockPart,
    CacheEmbedPart,
    EmbedPart,
    embed_tables,
    embedders,
)
from lcexport.graph.programs import export_program

BULK = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEOMETRY = Geometry(2, 3, 4, 6, cached_latents=2)
CLEAN = Geometry(1, 2, 4, 6)
TEXT = 10


@pytest.fixture(scope="module", params=[("fp32", "bulk"), ("bf16", "bulk"), ("bf16", "int8")])
def stored(request, dit_folder, tmp_path_factory):
    """(bulk dtype, the golden DiT, the tensors of its weights file)."""
    bulk, weights = request.param
    path = tmp_path_factory.mktemp("stored") / "dit.safetensors"
    checkpoint = open_checkpoint(dit_folder)
    write_native(checkpoint, path, bulk=bulk, weights=weights)
    tensors = load_file(path)
    return BULK[bulk], dit_from_tensors(checkpoint.config, tensors), tensors


def run(name, geometry, stored, prefix, activations):
    """The part's program, exported on fake tensors and run by torch on real ones."""
    bulk, dit, tensors = stored
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    program = export_program(dit.config, GraphSpec(geometry, TEXT, bulk), name, list(weights))
    with torch.inference_mode():
        return program.module()(*activations, *weights.values())


def same(made, wanted):
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


def tokens(bulk, geometry):
    """x, time, cos and sin."""
    rows = geometry.batch * geometry.tokens
    spread = geometry.cached_tokens + geometry.tokens
    return (
        torch.randn(rows, 256).to(bulk),
        torch.randn(geometry.batch * geometry.frames, 64),
        torch.randn(spread, 64),
        torch.randn(spread, 64),
    )


def test_a_block_with_a_cache_is_any_layer(stored):
    bulk, dit, _ = stored
    x, time, cos, sin = tokens(bulk, GEOMETRY)
    text = torch.randn(2 * TEXT, 256).to(bulk)
    cache = [torch.randn(2, 2, 48, 128).to(bulk) for _ in range(2)]
    given = (x, text, time, cos, sin, *cache)
    for layer in range(2):
        module = BlockPart(dit, GEOMETRY)
        module.block = dit.layers[layer]
        with torch.inference_mode():
            wanted = module(*given)
        same(run("Block", GEOMETRY, stored, f"blocks.{layer}.", given), wanted)


def test_a_block_that_makes_a_cache(stored):
    bulk, dit, tensors = stored
    given = tokens(bulk, CLEAN)
    module = CacheBlockPart(dit, CLEAN)
    kept = {name for name in tensors if "cross" not in name}
    made = run("CacheBlock", CLEAN, (bulk, dit, {n: tensors[n] for n in kept}), "blocks.0.", given)
    with torch.inference_mode():
        same(made, module(*given))


def test_the_tables_are_the_programs_own(golden, stored):
    bulk, dit, tensors = stored
    case = golden("dit_tiny_t2v")
    geometry = Geometry(2, 3, 4, 6)
    given = (
        case["hidden_states"],
        case["encoder_hidden_states"],
        case["timestep"][:, None].expand(-1, 3).contiguous(),
        case["encoder_attention_mask"].bool(),
    )
    module = EmbedPart(embedders(dit), embed_tables(dit.config, geometry))
    own = {name: t for name, t in tensors.items() if not name.startswith(("blocks", "final"))}
    with torch.inference_mode():
        same(run("Embed", geometry, (bulk, dit, own), "", given), module(*given))


def test_clean_frames_have_no_text(stored):
    bulk, dit, tensors = stored
    given = (torch.randn(1, 16, 2, 8, 12), torch.zeros(1, 2))
    names = ("patch_embed", "time_embedder")
    module = CacheEmbedPart(embedders(dit, names), embed_tables(dit.config, CLEAN))
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(names)}
    with torch.inference_mode():
        same(run("CacheEmbed", CLEAN, (bulk, dit, own), "", given), module(*given))


def test_weights_that_are_not_the_parts_are_refused(stored):
    bulk, dit, _ = stored
    with pytest.raises(BuildError, match=r"not its parameters.*no_such"):
        export_program(dit.config, GraphSpec(CLEAN, TEXT, bulk), "Final", ["no_such"])
