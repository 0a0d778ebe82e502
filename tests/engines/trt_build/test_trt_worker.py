"""A compiler in a process of its own: its plan, its errors, its death."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lcexport.configs.errors import BuildError, Cancelled, IncompatibleError, ResourceError
from lcexport.engines.trt import worker
from lcexport.engines.trt.network import Expectations, NetworkSummary
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import Product
from lcexport.engines.trt.sparse_plugin import Kernel
from lcexport.engines.trt.worker import compile_graph

READ = "import json,os,signal,sys,time; q=json.loads(sys.stdin.buffer.readline());"
READ += "sys.stdin.buffer.read(q['graph_bytes']);"


@pytest.fixture
def compile_apart(rtx: Product, dit_graph: Path, expected: Expectations, tmp_path: Path):
    """`compile_apart()` compiles the golden DiT in a child."""

    def run(graph: Path = dit_graph, output: Path = tmp_path / "dit.plan", **arguments):
        options = arguments.pop("options", TrtOptions())
        wanted = arguments.pop("expectations", expected)
        data = graph.read_bytes()
        return compile_graph("tensorrt-rtx", data, graph, output, options, wanted, **arguments)

    return run


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`pretend("os.abort()")` runs a child that reads its request and does that instead."""

    def run(code: str, **arguments):
        monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", READ + code))
        output = tmp_path / "dit.plan"
        options, wanted = TrtOptions(), Expectations(attentions=0)
        try:
            return compile_graph(
                "tensorrt-rtx", b"graph", Path("g.onnx"), output, options, wanted, **arguments
            )
        finally:
            assert not list(tmp_path.iterdir())

    return run


def test_what_the_child_notes_is_a_warning_here(monkeypatch, tmp_path: Path, caplog):
    nothing = dict.fromkeys(NetworkSummary.model_fields, 0) | {"inputs": (), "outputs": ()}
    report = {
        "bytes": 1, "sha256": "0", "seconds": 0.0, "peak_rss_bytes": 1, "version": "0",
        "summary": nothing, "notes": ["kernels are measured anew"],
    }  # fmt: skip
    say = (
        "open(q['output'], 'w').write('.'); assert not q['cache_named'];"
        f"print(json.dumps(['report', {report!r}]))"
    )
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", READ + say))
    output, wanted = tmp_path / "dit.plan", Expectations(attentions=0)
    compile_graph(
        "tensorrt", b"graph", Path("g.onnx"), output, TrtOptions(), wanted, cache_named=False
    )
    assert [record.message for record in caplog.records] == ["kernels are measured anew"]
    assert caplog.records[0].levelname == "WARNING"


# The child itself, but that it says what it would have done with TensorRT.
TOLD = """
from lcexport.configs.errors import BuildError
from lcexport.engines.trt import worker
done = []
def compile_plan(product, *rest, **options):
    raise BuildError(f"{product}: {done}, then compiled")
worker.open_product = lambda name: name
worker.register_plugin = lambda product, kernel: done.append((product, kernel.ptx))
worker.compile_plan = compile_plan
worker.main()
"""


@pytest.mark.parametrize(
    ("kernel", "done"),
    [(Kernel("attend", "some PTX", 128, 4096), "[('tensorrt', 'some PTX')]"), (None, "[]")],
)
def test_the_child_registers_a_kernel_before_it_parses(monkeypatch, tmp_path: Path, kernel, done):
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", TOLD))
    wanted = Expectations(attentions=0)
    with pytest.raises(BuildError) as caught:
        compile_graph(
            "tensorrt", b"graph", tmp_path / "g.onnx", tmp_path / "dit.plan", TrtOptions(), wanted,
            kernel=kernel,
        )  # fmt: skip
    assert str(caught.value) == f"tensorrt: {done}, then compiled"


def test_a_compiler_sees_the_one_gpu_it_is_for(pretend, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    say = "sys.stderr.write(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(3)"
    for gpu, seen in (("GPU-7c", "GPU-7c"), (None, "0,1")):
        with pytest.raises(BuildError, match=f"status 3; got {seen}"):
            pretend(say, gpu=gpu)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """Every child that is started, in order."""
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", start)
    return started


def test_a_child_compiles_the_same_plan_as_this_process(compile_apart, tmp_path: Path, expected):
    phases: list[str] = []
    report = compile_apart(on_progress=lambda fraction, phase: phases.append(phase))
    output = tmp_path / "dit.plan"
    assert hashlib.sha256(output.read_bytes()).hexdigest() == report.sha256
    assert output.stat().st_size == report.bytes
    assert report.summary.attentions == expected.attentions
    assert report.peak_rss_bytes > report.bytes
    assert "Building engine" in phases
    assert [path.name for path in tmp_path.iterdir()] == ["dit.plan"]


def test_the_childs_errors_are_raised_here_as_they_are(
    compile_apart, make_graph: Callable[..., Path], tmp_path: Path
):
    graph = make_graph("fp32", batch=1, frames=3)
    with pytest.raises(
        BuildError, match=r"not in one of the types that are built; got float32"
    ) as caught:
        compile_apart(graph)
    assert caught.value.do == "Build the bundle with --precision bf16."
    with pytest.raises(IncompatibleError, match="has no version_compatible"):
        compile_apart(options=TrtOptions(version_compatible=True))
    assert not list(tmp_path.iterdir())


def test_a_cancelled_build_ends_the_child_and_leaves_nothing(
    compile_apart, children, tmp_path: Path
):
    running: list[float] = []
    with pytest.raises(Cancelled):
        compile_apart(
            on_progress=lambda fraction, phase: running.append(fraction),
            cancel=lambda: bool(running),
        )
    assert children[0].poll() == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_child_and_leaves_nothing(compile_apart, children, tmp_path: Path):
    def interrupt(fraction: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_apart(on_progress=interrupt)
    assert children[0].poll() is not None
    assert not list(tmp_path.iterdir())


def test_a_child_killed_while_compiling_is_out_of_memory(compile_apart, children, tmp_path: Path):
    with pytest.raises(ResourceError, match=r"killed \(SIGKILL\), most likely .*more segments"):
        compile_apart(on_progress=lambda *step: os.kill(children[0].pid, signal.SIGKILL))
    assert not list(tmp_path.iterdir())


def test_a_crash_names_the_signal_and_the_last_words(pretend):
    message = json.dumps(["message", ["ERROR", "optimising node 7"]])
    code = f"print({message!r}, flush=True); print('stack', file=sys.stderr, flush=True);"
    with pytest.raises(BuildError, match=r"crashed \(SIGSEGV\); got optimising node 7 \| stack"):
        pretend(code + "os.kill(os.getpid(), signal.SIGSEGV)")


def test_an_exit_without_a_word_is_an_error(pretend):
    with pytest.raises(BuildError, match="ended with status 3; got no message"):
        pretend("sys.exit(3)")


def test_a_child_that_reads_nothing_is_an_error(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", "raise SystemExit(4)"))
    wanted = Expectations(attentions=0)
    graph = b"\0" * (1 << 20)  # more than a pipe holds
    with pytest.raises(BuildError, match="status 4"):
        compile_graph("tensorrt-rtx", graph, Path("g.onnx"), tmp_path / "p", TrtOptions(), wanted)
    assert not list(tmp_path.iterdir())


def test_a_child_that_hangs_can_be_cancelled(pretend):
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        pretend("time.sleep(600)", cancel=lambda: next(asked) > 3)


def test_a_plan_in_the_way_is_found_before_a_child_is_started(
    compile_apart, children, tmp_path: Path
):
    (tmp_path / "dit.plan").write_bytes(b"precious")
    with pytest.raises(ResourceError, match="will not overwrite"):
        compile_apart()
    assert not children


def test_a_full_disk_is_said_and_leaves_nothing(compile_apart, mount_disk: Callable[[str], Path]):
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match="disk is full"):
        compile_apart(output=disk / "dit.plan")
    assert not list(disk.iterdir())


def test_a_child_ends_with_its_parent(rtx: Product, dit_graph: Path, expected, tmp_path: Path):
    """Its standard input ends when the parent dies, however the parent dies."""
    graph = dit_graph.read_bytes()
    request = {
        "product": "tensorrt-rtx",
        "graph_path": str(dit_graph),
        "graph_bytes": len(graph),
        "options": {},
        "expectations": expected.model_dump(mode="json"),
        "check_memory": True,
        "output": str(tmp_path / "dit.plan"),
    }
    done = subprocess.run(
        worker.COMMAND,
        input=json.dumps(request).encode() + b"\n" + graph,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert not (tmp_path / "dit.plan").exists()
