"""A plan, and a bundle that was just built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcexport.engines.bundle import Bundle
from lcexport.show.console import amount, out, show_fact, show_text, table

if TYPE_CHECKING:
    from lcexport.builder import Plan


def show_plan(plan: Plan) -> None:
    """Sizes, FLOPs and memory of a build that was not run."""
    sizes = table(
        "Graphs", "name", ">pixels", ">frames", ">latents", ">tokens", ">PFLOP/step", ">saved"
    )
    for size in plan.sizes:
        sizes.add_row(
            size.graph,
            f"{size.height} x {size.width}",
            str(size.frames),
            "x".join(str(dim) for dim in size.latent_shape),
            f"{size.tokens:,}",
            f"{size.flops_per_step / 1e15:.4g}",
            f"{size.flops_saved:.0%}" if size.flops_saved else "",
        )
    needs = table("Needs", "what", ">needed", ">free")
    needs.add_row("disk", amount(plan.disk_needed_bytes), amount(plan.disk_free_bytes))
    needs.add_row(
        "memory to build", amount(plan.build_memory_bytes), amount(plan.memory_free_bytes)
    )
    if plan.plans_per_engine:
        needs.add_row("plans of each TensorRT engine", str(plan.plans_per_engine), "")
    needs.add_row("weights file", amount(plan.weights_bytes), "")
    for size in plan.sizes:
        name = size.graph
        needs.add_row(f"one step's activations, {name}", amount(size.activation_bytes), "")
        if size.attention_scores_bytes:
            scores = amount(size.attention_scores_bytes)
            needs.add_row(f"scores of masked text, {name}", scores, "")
        if size.cache_bytes:
            needs.add_row(f"key/value cache, {name}", amount(size.cache_bytes), "")
        needs.add_row(f"VAE decoding, {name}", amount(size.vae_decode_bytes), "")
    for offload, count in plan.runtime_bytes.items():
        needs.add_row(f"generating, offload={offload}", amount(count), "")
    show_fact("checkpoint", plan.model)
    show_fact("bundle", plan.output)
    show_fact("stages", ", ".join(plan.stages))
    out.print(sizes, needs)


def show_built(bundle: Bundle) -> None:
    """A fresh bundle: what each stage cost, and what to do with it."""
    show_stages(bundle)
    name = bundle.folder
    size = sum(record.bytes for record in bundle.manifest.files.values())
    show_text(f"bundle  {name}  ({amount(size)})")
    show_text(f"next    lcexport inspect {name}")
    if bundle.manifest.backends:
        show_text(f"        lcexport verify {name}")
        show_text(f'        lcexport generate {name} --prompt "..." --out x.mp4')


def show_stages(bundle: Bundle) -> None:
    """What each stage of the build cost."""
    stages = table("Build", "stage", ">seconds", ">peak memory")
    for stage in bundle.manifest.stages:
        stages.add_row(stage.name, f"{stage.seconds:.1f}", amount(stage.peak_rss_bytes))
    out.print(stages)
