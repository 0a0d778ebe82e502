"""`bench`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from lcexport.cli.app import DeviceOption, JsonOption, app, names, progress_bars
from lcexport.cli.output import LibraryOption
from lcexport.configs.errors import RegressionError, UsageError

BundlesArgument = Annotated[
    list[Path] | None,
    typer.Argument(help="A bundle's folder, or several side by side.", show_default=False),
]
BackendsOption = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas; `compile` is torch.compile. The bundle's first engine and eager "
        "by default."
    ),
]
BatchOption = Annotated[
    str | None, typer.Option(help="Of --demo: batches of its engines, such as 1,2.")
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Also draw the figures, a new .png file; needs matplotlib.")
]
CompareOption = Annotated[
    Path | None, typer.Option(help="The JSON of an earlier run of the same on this device.")
]
LimitOption = Annotated[
    str | None,
    typer.Option(help="How much worse a figure may be than the earlier one; 8% by default."),
]


@app.command()
def bench(
    bundles: BundlesArgument = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Measure the demo's big sibling, made for this run.")
    ] = False,
    backend: BackendsOption = None,
    res: Annotated[
        str | None, typer.Option(help="Which resolution; the bundle's first by default.")
    ] = None,
    task: Annotated[str, typer.Option(help="Which task.")] = "t2v",
    device: DeviceOption = "cpu",
    batch: BatchOption = None,
    steps: Annotated[int, typer.Option(help="Guided steps in a sampling.")] = 2,
    repeats: Annotated[int, typer.Option(help="Rounds, and repetitions of each stage.")] = 5,
    requests: Annotated[int, typer.Option(help="Whole videos back to back, per backend.")] = 2,
    plot: PlotOption = None,
    library_components: LibraryOption = False,
    compare: CompareOption = None,
    max_regression: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure backends side by side: steps, stages, start, memory, arithmetic."""
    from lcexport.bench.example import batches_from, example_bundles
    from lcexport.bench.run import Options, outputs_from, regressions
    from lcexport.bench.run import bench as run_bench
    from lcexport.bench.subject import check_names, subject_from
    from lcexport.engines.host import keep_freed_memory
    from lcexport.show.bench import show_bench
    from lcexport.show.console import show_line

    if demo == bool(bundles):
        raise UsageError("what is to be measured?", do="Name a bundle, or give --demo.")
    if not demo and batch:
        raise UsageError("--batch is of --demo: a bundle's is fixed", got=batch)
    if demo and (res or task != "t2v"):
        raise UsageError("--demo has one size and one task", do="Leave --res and --task out.")
    options = Options(steps, repeats, requests, library_components)
    outputs = outputs_from(plot, compare, max_regression)
    backends = names(backend)
    check_names(backends or ())
    keep_freed_memory()  # as `generate` does
    with ExitStack() as stack:
        if demo:
            backends = backends or ("onnxruntime", "eager")
            made = example_bundles(backends, device, batches_from(batch or "1"))
            bundles = stack.enter_context(made)
        subject = subject_from(bundles or [], device, backends, res, task)
        with progress_bars() as bar:
            document = run_bench(subject, options, outputs, bar)
    if as_json:
        show_line(document)
    else:
        show_bench(document)
    if worse := regressions(document):
        raise RegressionError(
            "worse than the earlier run", got=", ".join(worse),
            wanted=f"at most {outputs.limit:.1%} more",
        )  # fmt: skip
