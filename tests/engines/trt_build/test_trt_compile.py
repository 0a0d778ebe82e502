"""Plans compiled for real: whole, counted, digested; and each refusal leaves nothing behind."""

import hashlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from lcexport.configs.errors import (
    BuildError,
    Cancelled,
    IncompatibleError,
    ResourceError,
    UsageError,
)
from lcexport.engines.trt import compile as compiling
from lcexport.engines.trt import failures
from lcexport.engines.trt.compile import (
    Progress,
    available_memory_bytes,
    compile_plan,
    require_memory,
)
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import MessageLog, Product, ProductName


def test_a_plan_is_the_file_the_report_describes(compile_dit, expected, tmp_path: Path):
    output = tmp_path / "dit.plan"
    steps: list[tuple[float, str]] = []
    report = compile_dit(output, on_progress=lambda *step: steps.append(step))
    data = output.read_bytes()
    assert report.bytes == len(data) > report.summary.weights_bytes
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.summary.attentions == expected.attentions == 6
    assert report.version.startswith("tensorrt-rtx 1.")
    assert report.seconds > 0
    assert report.peak_rss_bytes > len(data)
    assert [path.name for path in tmp_path.iterdir()] == ["dit.plan"]
    fractions = [fraction for fraction, _ in steps]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.5 < fractions[-1] <= 1
    assert len({phase for _, phase in steps}) > 3


def test_targets_and_streaming_compile(compile_dit):
    report = compile_dit(compute_capabilities=("sm89", "sm120"), weight_streaming=True)
    assert report.bytes > report.summary.weights_bytes


@pytest.mark.parametrize("wish", ["strip_plan", "refit"])
def test_a_refittable_plan_needs_a_gpu_and_says_so(
    compile_dit, dit_graph: Path, wish, tmp_path: Path
):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    names = list(ir.load(dit_graph).graph.initializers)
    with pytest.raises(IncompatibleError, match=f"sees no GPU with {wish}; .*Build without"):
        compile_dit(**{wish: True}, refittable=names)
    assert not list(tmp_path.iterdir())


def test_a_weight_to_be_refitted_must_be_there(compile_dit, tmp_path: Path):
    with pytest.raises(BuildError, match=r"no weight that refitting could set; got blocks\.9\.w"):
        compile_dit(refit=True, refittable=["blocks.9.w"])
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_bfloat16_is_refused_by_name(compile_dit, tmp_path: Path):
    with pytest.raises(IncompatibleError, match=r"for sm75; .*no bfloat16"):
        compile_dit(compute_capabilities=("sm75",))
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_is_refused(compile_dit):
    with pytest.raises(UsageError, match="'sm90'"):
        compile_dit(compute_capabilities=("sm90",))


@pytest.mark.parametrize("width", [8, 257, 264, 384])
def test_a_head_of_a_width_that_does_not_fuse_is_refused_with_its_layer(
    compile_text, width, tmp_path: Path
):
    tensor = f"bfloat16[1,2,64,{width}]"
    node = "[wide] y = Attention <scale = 1.0> (q, k, v)"
    text = f"g ({tensor} q, {tensor} k, {tensor} v) => ({tensor} y) {{ {node} }}"
    with pytest.raises(BuildError, match=f"no fused kernel; got wide.*{width}") as caught:
        compile_text(text, Expectations(attentions=1))
    assert "not built" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_float32_attention_is_refused_by_the_compiler_too(
    compile_text, monkeypatch: pytest.MonkeyPatch
):
    """Were our own check wrong, the compiler would still not build it unfused."""
    monkeypatch.setattr(compiling, "check_network", unchecked)
    tensor = "float[1,2,64,64]"
    node = "y = Attention <scale = 1.0> (q, k, v)"
    text = f"g ({tensor} q, {tensor} k, {tensor} v) => ({tensor} y) {{ {node} }}"
    with pytest.raises(BuildError, match=r"no fused kernel; got .*float32"):
        compile_text(text)


def unchecked(*arguments):
    return SimpleNamespace(weights_bytes=0)


def test_a_cancelled_build_leaves_nothing(compile_dit, tmp_path: Path):
    asked = iter(range(1000))
    with pytest.raises(Cancelled):
        compile_dit(cancel=lambda: next(asked) > 20)
    assert 21 <= next(asked) < 1000
    assert not list(tmp_path.iterdir())


def test_a_callback_that_raises_stops_the_build(compile_dit, tmp_path: Path):
    def interrupted(fraction: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_dit(on_progress=interrupted)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(compile_dit, mount_disk: Callable[[str], Path]):
    disk = mount_disk("size=1m")
    with pytest.raises(ResourceError, match="disk is full"):
        compile_dit(disk / "dit.plan")
    assert not list(disk.iterdir())


def test_an_existing_plan_is_not_overwritten(compile_dit, tmp_path: Path):
    output = tmp_path / "dit.plan"
    output.write_bytes(b"precious")
    with pytest.raises(ResourceError, match="will not overwrite"):
        compile_dit(output)
    assert output.read_bytes() == b"precious"


def test_too_little_memory_is_refused_before_compiling(
    compile_dit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(compiling, "available_memory_bytes", lambda: 100 << 20)
    with pytest.raises(ResourceError, match=r"got 0\.1 GB available; wanted 0\.6 GB"):
        compile_dit()
    compile_dit(check_memory=False)


def test_the_memory_estimate_is_three_times_the_weights():
    require_memory(0)
    with pytest.raises(ResourceError, match="3 times the weights"):
        require_memory(available_memory_bytes() // 3)


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ("Please increase the workspace memory provided", ResourceError, "workspace_bytes"),
        ("no tactics to implement it within workspace limit", ResourceError, "workspace_bytes"),
        ("std::bad_alloc", ResourceError, "more segments"),
        ("Internal Error (Could not find any implementation)", BuildError, "implementation"),
    ],
)
def test_the_builders_messages_become_errors(rtx, message, error, words):
    log = MessageLog()
    log.add("ERROR", message)
    no_network: Any = None
    found = failures.build_error(rtx, TrtOptions(), log, no_network, Path("dit.onnx"))
    assert type(found) is error
    assert words in str(found)


CUDA_700 = "[myelin] CUDA_SUCCESS check failed: cudaErrorIllegalAddress (700)"
ECHO = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: CUDA ...)"


@pytest.mark.parametrize(
    ("name", "missing", "wishes", "error", "words"),
    [
        ("tensorrt", None, {}, BuildError, r"CUDA failed; got \[myelin\].*\(700\)"),
        ("tensorrt", "no driver", {}, BuildError, "CUDA failed"),
        ("tensorrt-rtx", None, {"refit": True}, BuildError, "CUDA failed"),
        ("tensorrt-rtx", "no driver", {}, IncompatibleError, r"sees no GPU; .*\. Use a machine"),
        (
            "tensorrt-rtx",
            "no driver",
            {"refit": True, "strip_plan": True},
            IncompatibleError,
            "GPU with strip_plan and refit; .*Build without strip_plan and refit, or on a machine",
        ),
    ],
)
def test_a_cuda_error_is_said_to_be_a_missing_gpu_only_where_one_is_missing(
    rtx: Product, monkeypatch: pytest.MonkeyPatch, name: ProductName, missing, wishes, error, words
):
    monkeypatch.setattr(failures, "missing_gpu", lambda: missing)
    log = MessageLog()
    for message in (CUDA_700, "and then something else", ECHO):
        log.add("ERROR", message)
    no_network: Any = None
    product = Product(name, rtx.trt, rtx.version)
    found = failures.build_error(product, TrtOptions(**wishes), log, no_network, Path("dit.onnx"))
    assert type(found) is error
    assert re.search(words, str(found)), found


def test_a_missing_driver_is_not_the_reason_of_every_failure(rtx: Product):
    log = MessageLog()
    for message in ("Error Code 4: API Usage Error", ECHO):
        log.add("ERROR", message)
    no_network: Any = None
    found = failures.build_error(rtx, TrtOptions(), log, no_network, Path("dit.onnx"))
    assert type(found) is BuildError
    assert "got Error Code 4: API Usage Error" in str(found)


def test_nested_phases_are_one_rising_fraction():
    seen: list[tuple[float, str]] = []
    progress = Progress(lambda *step: seen.append(step), None)
    progress.start("all", None, 2)
    progress.start("half", "all", 4)
    assert progress.step("half", 0)
    assert progress.step("half", 1)
    progress.finish("half")
    assert progress.step("all", 0)
    progress.start("again", "all", 2)
    assert progress.step("again", 0)
    assert seen == [
        (0, "all"),
        (0, "half"),
        (0.125, "half"),
        (0.25, "half"),
        (0.5, "all"),
        (0.5, "again"),
        (0.75, "again"),
    ]


def test_phases_may_run_on_several_threads():
    seen: list[float] = []
    progress = Progress(lambda fraction, _: seen.append(fraction), None)
    progress.start("all", None, 4)

    def work(name: str) -> None:
        progress.start(name, "all", 100)
        for step in range(100):
            assert progress.step(name, step)
        progress.finish(name)

    threads = [threading.Thread(target=work, args=(f"part {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert max(seen) <= 1


def test_every_progress_call_is_made_with_the_file_absent(compile_dit, tmp_path: Path):
    """The plan is under its own name only when it is whole."""
    output, present = tmp_path / "dit.plan", []
    compile_dit(output, on_progress=lambda *step: present.append(output.exists()))
    assert present
    assert not any(present)
    assert output.exists()


def test_missing_weights_are_refused(rtx, dit_graph: Path, tmp_path: Path, expected):
    with pytest.raises(BuildError, match="beside the graph"):
        compile_plan(
            rtx,
            dit_graph.read_bytes(),
            tmp_path / "dit.onnx",
            TrtOptions(),
            tmp_path / "dit.plan",
            expected,
        )
    assert not list(tmp_path.iterdir())
