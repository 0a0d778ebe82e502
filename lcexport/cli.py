"""The command line: parse, call one function, show its result. No logic lives here.

Results go to standard output, progress and logs to standard error. Exit codes: docs/exit-codes.md.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcexport.configs.errors import (
    IntegrityError,
    LcexportError,
    ResourceError,
    UsageError,
    VerificationError,
)

# Everything heavy is imported inside the command that needs it, so that --help is immediate.
if TYPE_CHECKING:
    from lcexport.builder import BuildOptions
    from lcexport.runtime import StepEvent

app = typer.Typer(
    name="lcexport",
    help="LongCat-Video checkpoints in, verified engines out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
# The base of typer's own complaints about the command line. Not imported from click: recent
# versions of typer carry a click of their own.
COMMAND_LINE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

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
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="The bundle; bundles/<name> by default.")
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or bf16 with the sensitive parts kept in fp32.")
]
IslandsOption = Annotated[
    str,
    typer.Option(
        help="Weights of the fp32 parts: `checkpoint` as released, `original` rounded to bf16."
    ),
]
BackendsOption = Annotated[str, typer.Option("--backend", help="Engines, separated by commas.")]
BatchOption = Annotated[int, typer.Option(help="Samples per call of the engine.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
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
TargetsOption = Annotated[
    str | None, typer.Option(help="GPUs to compile for, such as sm89,sm120; tensorrt-rtx only.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]


@app.command()
def build(
    model: ModelOption = None,
    res: ResOption = "480p",
    output: OutputOption = None,
    precision: PrecisionOption = "fp32",
    islands: IslandsOption = "checkpoint",
    backend: BackendsOption = "onnxruntime",
    batch: BatchOption = 1,
    device: DeviceOption = "cpu",
    only: OnlyOption = "all",
    segments: SegmentsOption = 0,
    targets: TargetsOption = None,
    add: Annotated[bool, typer.Option("--add", help="Add the resolution to a bundle.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed build.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only, like `plan`.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle: one weights file, a graph per resolution, engines."""
    from lcexport.builder import build as run_build
    from lcexport.builder import options_from
    from lcexport.show import show_built, show_json

    options = options_from(
        model=model, res=res, output=output, precision=precision, islands=islands,
        backends=backend, batch=batch, device=device, only=only, segments=segments,
        compute_capabilities=names(targets) or (), add=add, resume=resume,
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


@app.command()
def plan(
    model: ModelOption = None,
    res: ResOption = "480p",
    output: OutputOption = None,
    precision: PrecisionOption = "fp32",
    islands: IslandsOption = "checkpoint",
    backend: BackendsOption = "onnxruntime",
    batch: BatchOption = 1,
    device: DeviceOption = "cpu",
    only: OnlyOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Shapes, FLOPs, disk and memory of a build; refuses where the machine will not do."""
    from lcexport.builder import options_from

    options = options_from(
        model=model, res=res, output=output, precision=precision, islands=islands,
        backends=backend, batch=batch, device=device, only=only,
    )  # fmt: skip
    show_the_plan(options, as_json)


def show_the_plan(options: "BuildOptions", as_json: bool) -> None:
    """Print the plan, then refuse if disk or memory will not do."""
    from lcexport.builder import make_plan, refuse_shortage
    from lcexport.checkpoint import check_tensors, open_checkpoint
    from lcexport.show import show_json, show_plan

    checkpoint = open_checkpoint(options.model)
    check_tensors(checkpoint)
    made = make_plan(checkpoint, options)
    if as_json:
        show_json(made.as_dict())
    else:
        show_plan(made)
    refuse_shortage(made)


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle holds and how it was made. Needs no GPU and reads no weight."""
    from lcexport.engines.bundle import Bundle, read_manifest
    from lcexport.show import show_bundle, show_json

    manifest = read_manifest(bundle)
    if as_json:
        show_json(manifest.model_dump(mode="json"))
    else:
        show_bundle(Bundle(bundle, manifest))


@app.command()
def verify(
    bundle: BundleArgument,
    level: Annotated[
        str, typer.Option(help="hash, load, module, step or video; each includes the former.")
    ] = "step",
    backend: Annotated[
        str | None, typer.Option(help="Engines to check; those it was built with by default.")
    ] = None,
    res: Annotated[str | None, typer.Option(help="Resolutions; all by default.")] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Compare a bundle's files with its manifest, and its engines with eager torch."""
    from lcexport.show import show_json, show_verification
    from lcexport.verify import verify as run_verify

    with progress_bars() as bar:
        report = run_verify(
            bundle,
            level,
            backends=names(backend),
            resolutions=names(res),
            device=device,
            on_check=lambda check: bar(f"{check.level}: {check.name}", 0, 1),
        )
    if as_json:
        show_json(report.as_dict())
    else:
        show_verification(report)
    if any(check.level == "hash" for check in report.failed):
        raise IntegrityError(f"{bundle} is damaged", do="Copy it again, or rebuild it.")
    if not report.ok:
        raise VerificationError(f"{bundle} left its thresholds in {len(report.failed)} checks")


@app.command()
def check(
    bundle: BundleArgument,
    target: Annotated[
        str, typer.Option(help="tensorrt-10, tensorrt-11 or tensorrt-rtx.")
    ] = "tensorrt-11",
    as_json: JsonOption = False,
) -> None:
    """Say what a TensorRT parser would refuse in a bundle's graphs. Needs no TensorRT."""
    from lcexport.configs.errors import BuildError
    from lcexport.engines.bundle import open_bundle
    from lcexport.graph.check import check_graph
    from lcexport.show import show_json, show_violations

    opened = open_bundle(bundle)
    # `check_graph` refuses an unknown target itself, and says which there are.
    chosen: Any = target
    found = {
        name: check_graph(opened.path(graph.file), chosen)
        for name, graph in opened.manifest.graphs.items()
    }
    if as_json:
        show_json({name: [asdict(violation) for violation in row] for name, row in found.items()})
    else:
        show_violations(found, target)
    if count := sum(map(len, found.values())):
        raise BuildError(f"{target} would refuse the graphs of {bundle}", got=f"{count} violations")


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="What to show.")],
    out: Annotated[Path, typer.Option(help="The video, a new .mp4 file.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Also write a picture of some frames, a new .png file.")
    ] = None,
    res: Annotated[str | None, typer.Option(help="Which of the bundle's resolutions.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="The engine; the first it was built with by default.")
    ] = None,
    device: DeviceOption = "cpu",
    offload: Annotated[
        str, typer.Option(help="Text encoder and VAE: keep, cpu, or release after use.")
    ] = "keep",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the preset's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for none; the preset's by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Hash the large files too, before opening them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a video from a prompt."""
    from lcexport.engines.bundle import read_manifest
    from lcexport.engines.files import refuse_existing
    from lcexport.runtime import load
    from lcexport.show import show_json, show_video

    manifest = read_manifest(bundle)
    check_suffix(out, ".mp4")
    if contact_sheet:
        check_suffix(contact_sheet, ".png")
    refuse_existing(out, *([contact_sheet] if contact_sheet else []))
    with (
        load(
            bundle,
            res or next(iter(manifest.graphs)),
            backend or manifest.default_backend,
            device,
            check_hashes=check_hashes,
            offload=offload,  # pyright: ignore[reportArgumentType]  # checked by `load`
        ) as pipe,
        progress_bars() as bar,
    ):

        def on_step(event: "StepEvent") -> None:
            bar("denoising", event.step, event.steps)

        video = pipe.generate(
            prompt,
            negative_prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
    video.save(out)
    if contact_sheet:
        video.save_contact_sheet(contact_sheet)
    if as_json:
        show_json({"video": out, "contact_sheet": contact_sheet, "seconds": video.timings})
    else:
        show_video(video, out, contact_sheet)


@app.command()
def validate(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's folder.")],
    scan: Annotated[bool, typer.Option(help="Also read every weight, for NaN.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say everything that is wrong with a checkpoint, of any layout."""
    from lcexport.checkpoint import validate as run_validate
    from lcexport.configs.errors import InputError
    from lcexport.show import show_validation

    with progress_bars() as bar:
        report = run_validate(
            checkpoint, scan=scan, on_progress=lambda done, total: bar("scanning", done, total)
        )
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        show_validation(report)
    if not report.ok:
        raise InputError(f"{checkpoint} is not sound", got=f"{len(report.problems)} problems")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint's folder, of any layout.")],
    destination: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[
        str, typer.Option(help="`native` (FastVideo's names and folders) or `original`.")
    ] = "native",
    dtype: Annotated[str, typer.Option(help="`keep`, or `bf16` for the bulk.")] = "keep",
    islands: IslandsOption = "checkpoint",
    check: Annotated[bool, typer.Option("--check", help="Read both again and compare.")] = False,
) -> None:
    """Convert a checkpoint between the released and FastVideo's names and folders."""
    from lcexport.checkpoint import convert as run_convert
    from lcexport.show import show_conversion

    # `convert` checks these itself and says what it knows.
    choices: dict[str, Any] = {"to": to, "dtype": dtype, "islands": islands}
    with progress_bars() as bar:
        report = run_convert(
            source,
            destination,
            check=check,
            on_progress=lambda done, total: bar("converting", done, total),
            **choices,
        )
    show_conversion(report)


@app.command("demo-checkpoint")
def demo_checkpoint(
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
) -> None:
    """Write a small, complete, untrained checkpoint in the released layout."""
    from lcexport.demo import make_demo_checkpoint
    from lcexport.show import out

    make_demo_checkpoint(folder)
    out.print(f"A demo checkpoint is in {folder}. Next:")
    out.print(f"  lcexport build --model {folder} --res demo", highlight=False)


@app.command()
def version() -> None:
    """Show the version."""
    import lcexport

    sys.stdout.write(f"lcexport {lcexport.__version__}\n")


def check_suffix(path: Path, suffix: str) -> None:
    """Refuse before an hour's work what could not be written after it."""
    if path.suffix.lower() != suffix:
        raise UsageError("unknown kind of file", got=repr(str(path)), wanted=f"a {suffix} file")


def names(text: str | None) -> tuple[str, ...] | None:
    """A list separated by commas."""
    return tuple(part.strip() for part in text.split(",")) if text else None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that draws on standard error, with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield bar


def main() -> None:
    """The `lcexport` command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        # Not click's standalone mode: it would turn an interruption into exit code 1.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except LcexportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except COMMAND_LINE_ERROR as error:
        sys.stderr.write(f"error: {error} See `lcexport --help`.\n")
        sys.exit(UsageError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted; an unfinished build continues with --resume\n")
        sys.exit(INTERRUPTED)
    except OSError as error:  # a file that cannot be read, for one
        sys.stderr.write(f"error: {error}\n")
        sys.exit(ResourceError.exit_code)
