"""The TensorRT engine on the double: numbers, wiring, order of calls, and every refusal."""

import gc
import re
from dataclasses import replace

import onnx
import pytest
import torch
from trt_plans import plan_file, split, write_plans

from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.errors import (
    IncompatibleError,
    IntegrityError,
    LcexportError,
    ResourceError,
    UsageError,
)
from lcexport.dit import load_dit
from lcexport.engines.bundle import open_bundle
from lcexport.engines.ort import OrtEngine
from lcexport.engines.trt.memory import Workspace
from lcexport.engines.trt.runtime import RunOptions, TrtEngine
from lcexport.golden import BRANCHES, read_golden, run_branch
from lcexport.runtime import load

SIZE = "64x96x9"


@pytest.fixture(scope="module")
def demo_plans(demo_bundle, tmp_path_factory):
    return write_plans(demo_bundle / f"dit.{SIZE}.onnx", tmp_path_factory.mktemp("demo"), 3)


@pytest.fixture
def on_rtx(product, workspace, make_plans):
    """`on_rtx({"allocates": True}, cuda_graph=True)`: three plans, on TensorRT for RTX."""
    rtx = replace(product, name="tensorrt-rtx")
    opened = []

    def make(plan: dict, **wishes) -> TrtEngine:
        opened.append(TrtEngine(rtx, make_plans(3, **plan), workspace, RunOptions(**wishes)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def test_one_plan_equals_onnx_runtime(open_engine, make_graph, velocity):
    with OrtEngine(make_graph("fp32")) as wanted:
        assert torch.equal(velocity(open_engine(1)), velocity(wanted))


def test_segments_equal_onnx_runtime(open_engine, make_graph, velocity):
    with OrtEngine(make_graph("fp32")) as wanted:
        found = velocity(open_engine(3))
        torch.testing.assert_close(found, velocity(wanted), rtol=0, atol=2e-5)


def test_bfloat16_segments_equal_the_eager_model(open_engine, dit_folder, velocity, inputs):
    engine = open_engine(2, "bf16")
    assert torch.bfloat16 in {spec.dtype for spec in engine._steps[0].outputs}
    model = load_dit(dit_folder, torch.bfloat16)
    found = difference(velocity(engine), model(**inputs).float())
    assert STEP_TOLERANCE["bf16"].holds(found)


def test_it_is_an_engine(open_engine, make_graph):
    engine = open_engine(3)
    with OrtEngine(make_graph("fp32")) as other:
        assert (engine.inputs, engine.outputs) == (other.inputs, other.outputs)
    assert (engine.backend, engine.device) == ("tensorrt", torch.device("cpu"))


def test_a_pipeline_on_it_makes_the_same_video(demo_bundle, demo_plans, product, workspace):
    options = {"steps": 2, "seed": 3, "output": "latents"}
    with (
        TrtEngine(product, demo_plans, workspace) as engine,
        load(demo_bundle, SIZE, engine=engine) as pipeline,
        load(demo_bundle, SIZE) as reference,
    ):
        found = pipeline.generate("a cat", **options)
        torch.testing.assert_close(found, reference.generate("a cat", **options))
        golden = read_golden(open_bundle(demo_bundle), SIZE)
        for branch in BRANCHES:
            got = difference(run_branch(engine, golden, branch), golden[f"velocity_{branch}"])
            assert STEP_TOLERANCE["fp32"].holds(got)


def test_the_callers_buffers_are_read_and_filled_in_place(open_engine, inputs, output, ops):
    engine = open_engine(3)
    del ops.events[:]
    engine.run(inputs, {"velocity": output})
    first = output.clone()
    inputs["hidden_states"].mul_(2)
    engine.run(inputs, {"velocity": output})
    assert not torch.equal(output, first)
    assert ops.events == ["enter", "leave"] * 2  # nothing allocated, no wait on the host


def test_other_buffers_are_bound_anew(open_engine, velocity):
    engine = open_engine(3)
    assert torch.equal(velocity(engine), velocity(engine))


def test_engines_share_one_block(open_engine, ops, workspace, velocity):
    small = open_engine(1, plan={"scratch": 1 << 12})
    assert workspace.bytes == small.workspace_bytes
    wanted = velocity(small)
    large = open_engine(3)
    assert workspace.bytes == large.workspace_bytes > small.workspace_bytes
    # The block moved; the other engine notices.
    assert torch.equal(velocity(small), wanted)
    velocity(large)
    assert torch.equal(velocity(small), wanted)
    assert sum(event.startswith("allocate") for event in ops.events) == 2
    workspace.release()
    assert torch.equal(velocity(small), wanted)


def test_seams_are_reused(open_engine):
    engine = open_engine(4)  # x is handed on three times, in two places
    sizes = {
        spec.name: spec.dtype.itemsize * torch.Size(spec.shape).numel()
        for step in engine._steps
        for spec in step.outputs
        if spec.name != "velocity"
    }
    assert len(sizes) > 2
    scratch = max(context.scratch_bytes for context in engine._contexts)
    assert engine.workspace_bytes < scratch + sum(sizes.values())


class TestGraphCapture:
    def test_the_second_run_records_and_the_third_replays(self, open_engine, inputs, output, ops):
        engine = open_engine(3, cuda_graph=True)
        engine.run(inputs, {"velocity": output})
        wanted = output.clone()
        del ops.events[:]
        for _ in range(2):
            output.fill_(torch.nan)
            engine.run(inputs, {"velocity": output})
            assert torch.equal(output, wanted)
        assert ops.events == ["enter", "capture", "replay", "leave", "enter", "replay", "leave"]

    def test_other_addresses_are_not_replayed(self, open_engine, velocity, inputs, output, ops):
        engine = open_engine(3, cuda_graph=True)
        for _ in range(3):
            engine.run(inputs, {"velocity": output})
        del ops.events[:]
        assert torch.equal(velocity(engine), output)
        assert ops.events == ["enter", "leave"]

    def test_a_moved_block_is_not_replayed(self, open_engine, workspace, inputs, output, ops):
        engine = open_engine(3, cuda_graph=True)
        for _ in range(3):
            engine.run(inputs, {"velocity": output})
        held = workspace._block  # so that the new block is elsewhere
        workspace.release()
        del ops.events[:]
        engine.run(inputs, {"velocity": output})
        assert "replay" not in ops.events
        assert output.isfinite().all()
        del held

    def test_rtx_is_asked_first(self, on_rtx, inputs, output, ops):
        engine = on_rtx({"allocates": True}, cuda_graph=True)
        engine.run(inputs, {"velocity": output})
        wanted = output.clone()
        with pytest.raises(IncompatibleError, match=r"False for plan 0 of 3.*without cuda"):
            engine.run(inputs, {"velocity": output})
        assert "capture" not in ops.events
        assert ops.events[-1] == "leave"
        assert torch.equal(output, wanted)

    def test_rtx_records_what_allocates_nothing(self, on_rtx, inputs, output, ops):
        engine = on_rtx({}, cuda_graph=True)
        for _ in range(3):
            engine.run(inputs, {"velocity": output})
        assert ops.events[-2:] == ["replay", "leave"]

    def test_tensorrt_has_no_such_question(self, open_engine, inputs, output, double, monkeypatch):
        monkeypatch.delattr(double.IExecutionContext, "is_stream_capturable")
        engine = open_engine(3, cuda_graph=True)
        for _ in range(2):
            engine.run(inputs, {"velocity": output})


class TestWeightStreaming:
    PLAN = {"streamable": 1 << 20}  # noqa: RUF012

    def test_on_rtx_a_context_has_scratch_of_its_own(self, on_rtx, open_engine, velocity):
        engine = on_rtx({**self.PLAN, "allocates": True}, weight_budget=3 << 18)
        assert {context.scratch_bytes for context in engine._contexts} == {0}
        assert torch.equal(velocity(engine), velocity(open_engine(3)))

    def test_what_tensorrt_chooses_for_one_plan_is_shared_by_all(self, open_engine):
        engine = open_engine(3, plan=self.PLAN, weight_budget="auto")
        budgets = [plan.weight_streaming_budget_v2 for plan in engine._engines]
        assert budgets == [(1 << 19) // 3] * 3

    def test_the_budget_is_shared_out_before_contexts(self, open_engine, velocity, double):
        plain = velocity(open_engine(3))
        engine = open_engine(3, plan=self.PLAN, weight_budget=3 << 18)
        budgets = [plan.weight_streaming_budget_v2 for plan in engine._engines]
        assert budgets == [1 << 18] * 3
        assert not any("budget" in message for message in double.messages)
        # Streaming takes more scratch, which is asked for after the budget.
        scratch = {context.scratch_bytes for context in engine._contexts}
        assert scratch == {(1 << 16) + double.STREAMING_SCRATCH}
        assert torch.equal(velocity(engine), plain)

    @pytest.mark.parametrize(
        ("wish", "got"), [(None, 1 << 20), ("auto", 1 << 19), (9 << 30, 1 << 20)]
    )
    def test_other_budgets(self, open_engine, wish, got):
        engine = open_engine(1, plan=self.PLAN, weight_budget=wish)
        assert engine._engines[0].weight_streaming_budget_v2 == got

    def test_plans_that_cannot_stream(self, open_engine):
        with pytest.raises(UsageError, match=r"cannot stream weights.*Build them with"):
            open_engine(1, weight_budget=1 << 20)

    def test_a_budget_that_is_not_taken(self, open_engine, double):
        double.failures.add("ICudaEngine.weight_streaming_budget_v2")
        with pytest.raises(ResourceError, match=r"budget; got 0.00 GiB; wanted"):
            open_engine(1, plan=self.PLAN, weight_budget=0)

    def test_options_that_exclude_each_other(self):
        with pytest.raises(UsageError, match="exclude each other"):
            RunOptions(weight_budget=1, cuda_graph=True)
        with pytest.raises(UsageError, match="negative; got -1"):
            RunOptions(weight_budget=-1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            "Runtime.deserialize_cuda_engine",
            IncompatibleError,
            "refused .*segment-0.plan; got deserialize_cuda_engine returned None",
        ),
        ("IStreamReaderV2.__init__", IncompatibleError, "CUDA driver.*Failed to open cuda driver"),
        (
            "ICudaEngine.create_execution_context",
            ResourceError,
            "create_execution_context returned None.*stream weights",
        ),
        ("ICudaEngine.get_tensor_location:timestep", IncompatibleError, "timestep in host memory"),
        (
            "IExecutionContext.set_input_shape:timestep",
            LcexportError,
            r"set_input_shape\('timestep', \(2, 3\)\) returned False",
        ),
        ("IExecutionContext.infer_shapes:lacks", LcexportError, "infer_shapes lacks hidden_states"),
        (
            "IExecutionContext.infer_shapes:raises",
            LcexportError,
            "refused to run the engine; got infer_shapes: shape inference failed",
        ),
    ],
)
def test_opening_fails(open_engine, double, call, error, match):
    double.failures.add(call)
    with pytest.raises(error, match=match):
        open_engine(3)
    gc.collect()
    order = [name for name in double.destroyed if name != "IExecutionContext"]
    assert order[-1:] == ["Runtime"]  # all was given back, the runtime last


def test_a_runtime_that_cannot_be_made(open_engine, double):
    double.failures.add("Runtime.__init__")
    with pytest.raises(
        IncompatibleError, match=r"cannot make a runtime here; got .*nullptr.*driver"
    ):
        open_engine(1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ("IExecutionContext.set_tensor_address:embed.text", "set_tensor_address.'embed.text'."),
        ("IExecutionContext.set_tensor_address:velocity", "set_tensor_address.'velocity'."),
        (
            "IExecutionContext.execute_async_v3",
            "execute_async_v3 returned False for step 1 of 3",
        ),
    ],
)
def test_running_fails_and_recovers(open_engine, double, velocity, ops, call, match):
    engine = open_engine(3, cuda_graph=True)
    double.failures.add(call)
    with pytest.raises(LcexportError, match=match) as caught:
        velocity(engine)
    assert caught.value.exit_code == 1
    assert ops.events[-1] == "leave"  # the caller's stream is in order again
    double.failures.clear()
    assert velocity(engine).isfinite().all()


def test_the_log_is_in_the_error(open_engine, double, velocity, make_plans):
    engine = open_engine(1, plan={"stripped": True})
    with pytest.raises(LcexportError, match="weights were stripped and never refitted"):
        velocity(engine)


def test_out_of_device_memory(product, make_plans, double, ops):
    ops.memory = 1 << 10
    with pytest.raises(ResourceError, match=r"out of device memory.*got 1024 bytes free") as caught:
        TrtEngine(product, make_plans(1), Workspace(ops))
    assert caught.value.exit_code == 4
    del caught
    gc.collect()
    assert double.destroyed == ["IExecutionContext", "ICudaEngine", "Runtime"]


def test_no_memory_to_move_to(open_engine, workspace, velocity, ops):
    engine = open_engine(1)
    workspace.release()
    ops.memory = 0
    with pytest.raises(ResourceError, match="out of device memory"):
        velocity(engine)
    ops.memory = 1 << 30
    assert velocity(engine).isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("hidden_states", lambda t: t[:1], r"hidden_states .*got .*\[1, 16, 3, 8, 12\]"),
        ("hidden_states", lambda t: t.bfloat16(), "bfloat16.*wanted torch.float32"),
        ("encoder_attention_mask", lambda t: t.byte(), "uint8.*wanted torch.bool"),
        ("timestep", lambda t: t[:, :1].expand(-1, 3), "timestep is not contiguous"),
        ("timestep", lambda t: t.to("meta"), "timestep is elsewhere; got meta; wanted cpu"),
    ],
)
def test_inputs_that_do_not_fit(open_engine, inputs, output, name, change, match):
    engine = open_engine(1)
    inputs[name] = change(inputs[name])
    with pytest.raises(UsageError, match=match):
        engine.run(inputs, {"velocity": output})
    assert output.isnan().all()


def test_a_tensor_that_is_missing(open_engine, inputs, output):
    engine = open_engine(1)
    with pytest.raises(UsageError, match=r"velocity is missing; got \[\]"):
        engine.run(inputs, {})
    del inputs["timestep"]
    with pytest.raises(UsageError, match="timestep is missing"):
        engine.run(inputs, {"velocity": output})


def test_close_gives_back_in_order_and_twice_is_harmless(open_engine, velocity, double, ops):
    engine = open_engine(3)
    velocity(engine)
    gc.collect()
    double.destroyed.clear()
    engine.close()
    engine.close()
    assert double.destroyed == ["IExecutionContext"] * 3 + ["ICudaEngine"] * 3 + ["Runtime"]
    assert ops.events[-1] == "synchronize"
    for use in (lambda: velocity(engine), lambda: engine.refit({})):
        with pytest.raises(UsageError, match="the engine is closed"):
            use()


def test_segments_in_the_wrong_order(product, workspace, make_plans):
    with pytest.raises(IntegrityError, match="do not fit together at"):
        TrtEngine(product, make_plans(3)[::-1], workspace)
    with pytest.raises(IntegrityError, match="do not fit together at"):
        TrtEngine(product, make_plans(3)[:1] * 2, workspace)
    with pytest.raises(IntegrityError, match="without a plan"):
        TrtEngine(product, [], workspace)


def test_a_missing_segment_is_another_input(product, workspace, make_plans):
    with TrtEngine(product, make_plans(3)[1:], workspace) as engine:
        names = {spec.name for spec in engine.inputs}
    assert "embed.text" in names  # which no caller gives, and the manifest does not name


def test_segments_of_different_graphs(product, workspace, make_graph, tmp_path, double):
    pieces = split(onnx.load(make_graph("fp32")), 2)
    wanted = next(value for value in pieces[1].graph.input if value.name == "embed.text")
    wanted.type.tensor_type.shape.dim[0].dim_value += 1
    files = []
    for number, piece in enumerate(pieces):
        path = tmp_path / f"{number}.plan"
        path.write_bytes(double.plan_bytes(piece))
        files.append(plan_file(path))
    with pytest.raises(IntegrityError, match=r"at embed.text; got .*21.*; wanted .*20"):
        TrtEngine(product, files, workspace)


def test_a_dynamic_plan(product, workspace, make_graph, tmp_path, double):
    model = split(onnx.load(make_graph("fp32")), 1)[0]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    path = tmp_path / "dynamic.plan"
    path.write_bytes(double.plan_bytes(model))
    with pytest.raises(IncompatibleError, match=r"hidden_states has no static shape; got \[-1, 16"):
        TrtEngine(product, [plan_file(path)], workspace)


def test_host_code_is_allowed_only_where_asked(product, workspace, make_plans):
    for allowed in (False, True):
        with TrtEngine(product, make_plans(1), workspace, host_code=allowed) as engine:
            assert engine._runtime is not None
            assert engine._runtime.engine_host_code_allowed is allowed


def test_the_double_says_so(product, workspace, make_plans, double):
    TrtEngine(product, make_plans(1), workspace).close()
    assert any(re.search("TEST DOUBLE", message) for message in double.messages)
