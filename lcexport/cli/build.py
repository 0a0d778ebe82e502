"""`build` and `plan`."""

from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcexport.cli.app import DeviceOption, IslandsOption, JsonOption, app, pairs, progress_bars
from lcexport.configs.errors import UsageError

if TYPE_CHECKING:
    from lcexport.builder import BuildOptions

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="The checkpoint's folder; $LCEXPORT_MODEL or weights/LongCat-Video by default.",
    ),
]
ResOption = Annotated[
    str,
    typer.Option(help="Presets or HEIGHTxWIDTHxFRAMES, separated by commas."),
]
TaskOption = Annotated[
    str, typer.Option("--task", help="t2v, i2v, vc, refine, ...: see docs/tasks.md; by commas.")
]
CondFramesOption = Annotated[
    int, typer.Option(help="Frames of video that a continuation starts from.")
]
RefineSizeOption = Annotated[
    str | None,
    typer.Option(help="HEIGHTxWIDTH of refined videos; by default 720p's, of the same shape."),
]
RefineCondFramesOption = Annotated[
    int | None,
    typer.Option(help="Refined frames that a refinement starts from; twice --cond-frames."),
]
DenseOption = Annotated[
    bool, typer.Option("--dense", help="Refine without block-sparse attention.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="The bundle; bundles/<name> by default.")
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or bf16 with the sensitive parts kept in fp32.")
]
WeightsDtypeOption = Annotated[
    str,
    typer.Option(
        help="Of the bulk's weights: `bulk` as --precision computes, or `int8` with a scale for "
        "each row, multiplied out by the engine."
    ),
]
BackendsOption = Annotated[str, typer.Option("--backend", help="Engines, separated by commas.")]
BatchOption = Annotated[int, typer.Option(help="Samples per call of the engine.")]
OnlyOption = Annotated[
    str,
    typer.Option(
        help="`export` stops after weights and graphs, `compile` after the engines; `all` also "
        "runs them against eager torch."
    ),
]
SegmentsOption = Annotated[
    int, typer.Option(help="Plans per TensorRT engine; 0 for as few as this memory allows.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="Of TensorRT plans: `inside` each, or `shared` by all blocks and resolutions, handed "
        "in at run time."
    ),
]
TrtOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trt", help="Another option of TensorRT, such as optimization_level=4; may be repeated."
    ),
]
TargetsOption = Annotated[
    str | None, typer.Option(help="GPUs to compile for, such as sm89,sm120; tensorrt-rtx only.")
]

LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="A LoRA to merge into the weights: a file, or a name in the checkpoint's lora/, with "
        ":STRENGTH behind it where it is not 1; may be repeated.",
    ),
]
EpContextOption = Annotated[
    bool, typer.Option("--ep-context", help="Wrap the plans in an ONNX model for ONNX Runtime.")
]
CompileComponentsOption = Annotated[
    bool,
    typer.Option(
        "--compile-components",
        help="Compile the text encoder and the VAE's decoder too; aotinductor only.",
    ),
]


@app.command()
def build(
    model: ModelOption = None,
    res: ResOption = "480p",
    task: TaskOption = "t2v",
    cond_frames: CondFramesOption = 13,
    refine_size: RefineSizeOption = None,
    refine_cond_frames: RefineCondFramesOption = None,
    dense: DenseOption = False,
    output: OutputOption = None,
    precision: PrecisionOption = "fp32",
    islands: IslandsOption = "checkpoint",
    weights_dtype: WeightsDtypeOption = "bulk",
    backend: BackendsOption = "onnxruntime",
    batch: BatchOption = 1,
    device: DeviceOption = "cpu",
    only: OnlyOption = "all",
    weights: WeightsOption = "inside",
    segments: SegmentsOption = 0,
    targets: TargetsOption = None,
    trt: TrtOption = None,
    ep_context: EpContextOption = False,
    compile_components: CompileComponentsOption = False,
    lora: LoraOption = None,
    add: Annotated[bool, typer.Option("--add", help="Add the graphs to a bundle.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed build.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only, like `plan`.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle: one weights file, a graph per resolution, engines."""
    from lcexport.builder import build as run_build
    from lcexport.builder import options_from
    from lcexport.show.build import show_built
    from lcexport.show.console import show_json

    if add and model:
        raise UsageError(
            "--add takes its weights from the bundle", got=f"--model {model}",
            do="Leave --model out.",
        )  # fmt: skip
    options = options_from(
        model=model, res=res, task=task, cond_frames=cond_frames, refine_size=refine_size,
        refine_cond_frames=refine_cond_frames, dense=dense, output=output, precision=precision,
        islands=islands, weights_dtype=weights_dtype, backends=backend, batch=batch, device=device,
        only=only, weights=weights, segments=segments, targets=targets, trt=pairs(trt or ()),
        ep_context=ep_context, compile_components=compile_components, loras=lora or (), add=add,
        resume=resume,
    )  # fmt: skip
    if dry_run:
        show_the_plan(options, as_json)
        return
    with progress_bars() as bar:
        bundle = run_build(options, on_progress=bar)
    if as_json:
        show_json(bundle.manifest.model_dump(mode="json"))
    else:
        show_built(bundle)


def plan(**asked: Any) -> None:
    """Shapes, FLOPs, disk and memory of a build; refuses what the build would refuse."""
    build(**asked, dry_run=True)


# One declaration for both: a plan takes whatever `build` takes.
taken = [given for given in signature(build).parameters.values() if given.name != "dry_run"]
setattr(plan, "__signature__", Signature(taken))  # noqa: B010  # pyright knows no such attribute
app.command()(plan)


def show_the_plan(options: "BuildOptions", as_json: bool) -> None:
    """Refuse what the build would refuse; print the plan before disk and memory are judged."""
    from lcexport.builder import preflight
    from lcexport.show.build import show_plan
    from lcexport.show.console import show_json

    preflight(options, lambda made: show_json(made.as_dict()) if as_json else show_plan(made))
