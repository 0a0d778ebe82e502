"""A plan compiled in a process of its own, because a compiler may crash or be killed.

The parent sends one line of JSON and the graph's bytes to the child's standard input and reads
lines of JSON from its standard output: progress, messages, then a report or an error. The child
writes to a private folder beside the output, which the parent publishes or removes; a child whose
parent dies sees its standard input end, and ends too.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import lcexport
from lcexport.configs import errors
from lcexport.configs.errors import BuildError, Cancelled, LcexportError, ResourceError
from lcexport.engines.files import publish, refuse_existing, resource_errors, sync_folder
from lcexport.engines.trt.compile import Cancel, OnProgress, PlanReport, compile_plan
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TF32_OVERRIDE, TrtOptions, overrides_tf32
from lcexport.engines.trt.product import MessageLog, ProductName, open_product
from lcexport.engines.trt.sparse_plugin import Kernel, register_plugin

# Not `-m`: the module may have been imported by its package by then. `-P`: a file in the folder we
# happen to be in, of the name of a module, is not run; ours is found by `child_environment`.
COMMAND = (sys.executable, "-P", "-c", "from lcexport.engines.trt.worker import main; main()")
POLL_SECONDS = 0.1
SHOWN_MESSAGES = 3
PLAN = "plan"
ADVICE = (  # to one whose compiler was killed, or crashed
    "Build in more segments, which need less memory each, or free some.",
    "Try another version of TensorRT: in a report of such a crash (NVIDIA/TensorRT#4842) another "
    "optimization_level did not help.",
)
FIELDS = ("what", "got", "wanted", "do")
Answer = Callable[[str, object], None]  # (kind of line, its value)


def compile_graph(
    product_name: ProductName,
    graph: bytes,
    graph_path: Path,
    output: Path,
    options: TrtOptions,
    expectations: Expectations,
    on_progress: OnProgress | None = None,
    cancel: Cancel | None = None,
    *,
    check_memory: bool = True,
    refittable: Iterable[str] = (),
    cache_named: bool = True,
    gpu: str | None = None,
    kernel: Kernel | None = None,
) -> PlanReport:
    """Compile `graph` to the new file `output` in a process of its own.

    Arguments and errors are those of `compile_plan`; besides:

    Args:
        gpu: the one GPU that the process sees, by its own name.
        kernel: what the process registers as the plugin of block-sparse attention.

    Raises:
        BuildError: the compiler crashed; names the signal and its last messages.
        ResourceError: the compiler was killed, which is what Linux does when memory runs out.
    """
    refuse_existing(output)
    request = {
        "product": product_name,
        "graph_path": str(graph_path.absolute()),
        "graph_bytes": len(graph),
        "options": options.model_dump(mode="json"),
        "expectations": expectations.model_dump(mode="json"),
        "check_memory": check_memory,
        "refittable": list(refittable),
        "cache_named": cache_named,
        "kernel": None if kernel is None else asdict(kernel),
    }
    with private_folder(output) as folder, tempfile.TemporaryFile() as stderr:
        plan = folder / PLAN
        request["output"] = str(plan)
        with child(stderr, COMMAND, compiler_environment(gpu)) as process:
            answer = converse(process, stderr, request, graph, on_progress, cancel)
        report = PlanReport.model_validate(answer)
        with resource_errors(output):
            publish(plan, output)
            sync_folder(output.parent)
    for note in report.notes:
        logging.getLogger(__name__).warning(note)
    return report


@contextmanager
def private_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, gone afterwards with all that is in it."""
    with resource_errors(output):
        folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    with folder as name:
        yield Path(name).absolute()


@contextmanager
def child(
    stderr: IO[bytes], command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The compiling process; neither it nor what it starts outlives the block.

    A session of its own keeps a terminal's Ctrl-C from it: the parent ends it in order.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # a request it never read
                    continue
        process.wait()


def child_environment(gpu: str | None = None) -> dict[str, str]:
    """This process's own, with this lcexport first among what Python finds, and `gpu` alone.

    As we read the API, TensorRT builds on CUDA's current device, the first.
    """
    package = str(Path(lcexport.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {**os.environ, **seen, "PYTHONPATH": os.pathsep.join(paths)}


def compiler_environment(gpu: str | None = None) -> dict[str, str]:
    """`child_environment` without a wish for TF32, which overrules RTX 1.7.1's flag."""
    environment = child_environment(gpu)
    if overrides_tf32():
        del environment[TF32_OVERRIDE]
    return environment


def converse(
    process: subprocess.Popen[bytes],
    stderr: IO[bytes],
    request: dict[str, Any],
    graph: bytes,
    on_progress: OnProgress | None,
    cancel: Cancel | None,
    advice: tuple[str, str] = ADVICE,
) -> object:
    """Send the request, follow the child's lines, and return its report or raise its error."""
    lines = started_reader(process)
    send(process, request, graph)
    log = MessageLog()
    while True:
        if cancel is not None and cancel():
            raise Cancelled("the build was cancelled")
        try:
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            raise crash_error(process.wait(), log, stderr, advice)
        kind, value = json.loads(line)
        if kind == "report":
            return value
        if kind == "error":
            raise error_from(value)
        if kind == "message":
            log.add(*value)
        elif kind == "progress" and on_progress is not None:
            on_progress(*value)


def started_reader(process: subprocess.Popen[bytes]) -> "queue.Queue[bytes | None]":
    """The child's lines as they come, and None at their end."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        try:
            for line in stdout:
                lines.put(line)
        except ValueError:  # closed under our hands: the parent has given up
            pass
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def send(process: subprocess.Popen[bytes], request: dict[str, Any], graph: bytes) -> None:
    """Write the request and leave the pipe open: its end is how the child learns of ours."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n" + graph)
        process.stdin.flush()
    except BrokenPipeError:
        return  # it died; its lines end, and its exit status says how


def crash_error(
    status: int, log: MessageLog, stderr: IO[bytes], advice: tuple[str, str] = ADVICE
) -> LcexportError:
    """The error for a child that ended without a word."""
    stderr.seek(0)
    tail = stderr.read().decode(errors="replace").strip().splitlines()[-SHOWN_MESSAGES:]
    said = [*list(log.errors)[-SHOWN_MESSAGES:], *tail] or list(log.warnings)[-SHOWN_MESSAGES:]
    got = " | ".join(said) or "no message"
    if status == -signal.SIGKILL:
        return ResourceError(
            "the compiler was killed (SIGKILL), most likely because memory ran out",
            got=got,
            do=advice[0],
        )
    if status < 0:
        return BuildError(
            f"the compiler crashed ({signal.Signals(-status).name})",
            got=got,
            do=advice[1],
        )
    return BuildError(f"the compiler ended with status {status}", got=got)


def value_from(error: LcexportError) -> dict[str, str | None]:
    """An error's class and its four answers, as they go through a pipe."""
    fields = {name: getattr(error, name, None) for name in FIELDS}
    said = {name: None if field is None else str(field) for name, field in fields.items()}
    return {"type": type(error).__name__, **said}


def error_from(value: dict[str, Any]) -> LcexportError:
    """The child's error as it was raised there."""
    kind = getattr(errors, value["type"])
    what, got, wanted, do = (value[name] for name in FIELDS)
    return kind(what, got=got, wanted=wanted, do=do)


def main() -> None:
    """The child that compiles a plan."""
    serve(plan_report)


def plan_report(request: dict[str, Any], graph: bytes, answer: Answer) -> object:
    """Compile what the request asks for."""
    log = MessageLog(lambda severity, message: answer("message", [severity, message]))
    product = open_product(request["product"])
    if request["kernel"] is not None:
        register_plugin(product, Kernel(**request["kernel"]))
    report = compile_plan(
        product,
        graph,
        Path(request["graph_path"]),
        TrtOptions.model_validate(request["options"]),
        Path(request["output"]),
        Expectations.model_validate(request["expectations"]),
        on_progress=lambda fraction, phase: answer("progress", [fraction, phase]),
        log=log,
        check_memory=request["check_memory"],
        refittable=request["refittable"],
        cache_named=request["cache_named"],
    )
    return report.model_dump(mode="json")


def serve(work: Callable[[dict[str, Any], bytes, Answer], object]) -> NoReturn:
    """A child: one request from standard input, lines of JSON to standard output."""
    requests, answers = sys.stdin.buffer, private_stdout()
    lock = threading.Lock()  # messages may come from a compiler's threads

    def answer(kind: str, value: object) -> None:
        with lock:
            answers.write(json.dumps([kind, value]).encode() + b"\n")
            answers.flush()

    request = json.loads(requests.readline())
    graph = requests.read(request["graph_bytes"])
    threading.Thread(target=end_with_parent, args=(requests,), daemon=True).start()
    try:
        report = work(request, graph, answer)
    except LcexportError as error:
        answer("error", value_from(error))
    else:
        answer("report", report)
    os._exit(0)  # all is said: a fault of a library's own clean-up would only confuse


def private_stdout() -> BinaryIO:
    """Standard output for us alone: what native code prints goes to standard error."""
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def end_with_parent(requests: BinaryIO) -> None:
    """Wait for the end of standard input, which nobody else can cause, and leave."""
    while requests.read(1):
        time.sleep(POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
