"""The ONNX Runtime engine: eager's numbers, in the caller's buffers, or an error that helps."""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.dit import load_dit
from lcexport.engines import open_engine
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.ort import RECORDED_SETS, OrtEngine, OrtOptions, graph_file
from lcexport.golden import BRANCHES, read_golden, run_branch

SIZE = "64x96x9"


@pytest.fixture(scope="module")
def graph(make_graph) -> Path:
    return make_graph()


@pytest.fixture
def engine(graph):
    with OrtEngine(graph) as engine:
        yield engine


@pytest.fixture
def inputs(engine) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.rand(spec.shape) > 0.5
        if spec.dtype == torch.bool
        else torch.randn(spec.shape)
        for spec in engine.inputs
    }


@pytest.fixture
def output() -> torch.Tensor:
    return torch.full((2, 16, 3, 8, 12), torch.nan)


@pytest.fixture
def bundle(demo_bundle) -> Bundle:
    return open_bundle(demo_bundle)


def test_it_equals_eager(engine, inputs, output, dit_folder):
    engine.run(inputs, {"velocity": output})
    wanted = load_dit(dit_folder)(**inputs)
    torch.testing.assert_close(output, wanted, rtol=0, atol=2e-5)


def test_the_callers_own_buffer_is_filled_each_time(engine, inputs, output):
    address, view = output.data_ptr(), output[1:]
    engine.run(inputs, {"velocity": output})
    assert output.data_ptr() == address
    assert torch.isfinite(view).all()
    first = output.clone()
    inputs["hidden_states"].mul_(2)  # in place: the engine reads the same addresses again
    engine.run(inputs, {"velocity": output})
    assert not torch.equal(output, first)


@pytest.fixture
def bindings(monkeypatch) -> list[ort.IOBinding]:
    """Every binding that is made from now on."""
    made = []
    make = ort.InferenceSession.io_binding

    def io_binding(session):
        made.append(make(session))
        return made[-1]

    monkeypatch.setattr(ort.InferenceSession, "io_binding", io_binding)
    return made


def test_tensors_are_bound_once_while_they_stay_where_they_are(engine, inputs, output, bindings):
    for _ in range(3):
        inputs["hidden_states"].normal_()
        engine.run(dict(inputs), {"velocity": output})
    assert len(bindings) == 1


@pytest.mark.parametrize("name", ["hidden_states", "encoder_attention_mask", "velocity"])
def test_a_tensor_elsewhere_is_bound_anew(engine, inputs, output, bindings, name):
    engine.run(inputs, {"velocity": output})
    first = output.clone()
    tensors = {**inputs, "velocity": output}
    elsewhere = torch.zeros_like(tensors[name])
    moved = {**tensors, name: elsewhere}
    engine.run(moved, moved)
    assert len(bindings) == 2
    if name == "velocity":
        assert torch.equal(elsewhere, first)
        assert torch.equal(output, first)
    else:
        assert not torch.equal(output, first)
        engine.run(inputs, {"velocity": output})
        assert torch.equal(output, first)


def test_each_set_of_tensors_has_a_recording_of_its_own(graph, inputs, output, monkeypatch):
    """The options are those of CUDA; the processor's session does not look at them."""
    ids = []
    run = ort.InferenceSession.run_with_iobinding

    def spy(session, binding, options):
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        run(session, binding, options)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", spy)
    outputs = [torch.empty_like(output) for _ in range(RECORDED_SETS + 1)]
    with OrtEngine(graph) as engine:
        engine.how = OrtOptions(cuda_graph=True)
        for index in (0, 0, 1, 0, *range(2, RECORDED_SETS + 1), 1):
            engine.run(inputs, {"velocity": outputs[index]})
    assert ids == ["1", "1", "2", "1", "3", "4", "5", "6", "7", "8", "-1", "2"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cuda_graph": "true"}, "cuda_graph is for .*got onnxruntime on cpu"),
        ({"cuda_graph": "perhaps"}, "do not take the option cuda_graph.*got 'perhaps'"),
        ({"threads": 2}, "the option threads.*wanted one of cuda_graph"),
    ],
)
def test_options_that_do_not_fit(bundle, options, match):
    with pytest.raises(UsageError, match=match):
        open_engine("onnxruntime", bundle, SIZE, options=options)


def test_a_processor_runs_the_graph_of_fused_operations(bundle):
    record = bundle.graph(SIZE)
    assert graph_file(record, "cpu") == f"dit.{SIZE}.ort.onnx"
    assert graph_file(record, "cuda:1") == record.file == f"dit.{SIZE}.onnx"


def test_a_bundle_without_that_graph_says_what_to_do(bundle):
    record = bundle.graph(SIZE).model_copy(update={"fused": None})
    manifest = bundle.manifest.model_copy(update={"graphs": {SIZE: record}})
    with pytest.raises(IncompatibleError, match=r"no graph of 64x96x9 .*Rebuild the bundle"):
        open_engine("onnxruntime", Bundle(bundle.folder, manifest), SIZE)


def test_its_inputs_and_output(engine):
    assert engine.backend == "onnxruntime"
    assert {spec.name: spec.shape for spec in (*engine.inputs, *engine.outputs)} == {
        "hidden_states": (2, 16, 3, 8, 12),
        "encoder_hidden_states": (2, 1, 10, 64),
        "timestep": (2, 3),
        "encoder_attention_mask": (2, 10),
        "velocity": (2, 16, 3, 8, 12),
    }


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("hidden_states", lambda t: t[:1], r"hidden_states .*got .*\[1, 16, 3, 8, 12\]"),
        ("hidden_states", lambda t: t.double(), "float64.*wanted torch.float32"),
        ("encoder_attention_mask", lambda t: t.long(), "int64.*wanted torch.bool"),
        ("timestep", lambda t: t[:, 0], r"timestep .*wanted .*\[2, 3\]"),
        ("timestep", lambda t: t[:, :1].expand(-1, 3), "timestep is not contiguous"),
    ],
)
def test_inputs_that_do_not_fit(engine, inputs, output, name, change, match):
    inputs[name] = change(inputs[name])
    with pytest.raises(UsageError, match=match):
        engine.run(inputs, {"velocity": output})
    assert output.isnan().all()


def test_an_output_that_does_not_fit(engine, inputs, output):
    for wrong in (output[:1], output.half(), output.transpose(3, 4).contiguous().transpose(3, 4)):
        with pytest.raises(UsageError, match="engine tensor velocity"):
            engine.run(inputs, {"velocity": wrong})


def test_a_closed_engine(graph, inputs, output):
    engine = OrtEngine(graph)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(inputs, {"velocity": output})


def test_a_bundles_engine_repeats_its_golden_outputs(bundle):
    golden = read_golden(bundle, SIZE)
    with open_engine("onnxruntime", bundle, SIZE) as engine:
        for branch in BRANCHES:
            found = difference(run_branch(engine, golden, branch), golden[f"velocity_{branch}"])
            assert STEP_TOLERANCE["fp32"].holds(found)


def test_bfloat16_on_a_processor_says_what_to_do(bundle):
    manifest = bundle.manifest.model_copy(update={"precision": "bf16"})
    with pytest.raises(IncompatibleError, match="--precision fp32, or use --device cuda") as caught:
        open_engine("onnxruntime", Bundle(bundle.folder, manifest), SIZE)
    assert caught.value.exit_code == 5


def test_cuda_without_its_provider_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(IncompatibleError, match=r"no CUDA provider.*pip install onnxruntime-gpu"):
        open_engine("onnxruntime", bundle, SIZE, "cuda")


@pytest.mark.parametrize("device", ["meta", "tpu", "", "cuda:x"])
def test_an_unknown_device(bundle, device):
    with pytest.raises(UsageError, match=r"unknown device.*got '.*'; wanted cpu, cuda") as caught:
        open_engine("onnxruntime", bundle, SIZE, device)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a graph at all"])
def test_a_file_that_is_no_graph(tmp_path, content):
    path = tmp_path / "dit.onnx"
    path.write_bytes(content)
    with pytest.raises(IncompatibleError, match=r"cannot open .*Rebuild the bundle") as caught:
        OrtEngine(path)
    assert str(path) in str(caught.value)


def test_a_graph_without_its_weights(graph, tmp_path):
    path = tmp_path / "dit.onnx"
    path.write_bytes(graph.read_bytes())
    with pytest.raises(IncompatibleError, match="cannot open"):
        OrtEngine(path)


def test_a_graph_of_other_inputs_than_the_manifest_says(bundle):
    record = bundle.graph(SIZE)
    other = record.model_copy(update={"inputs": record.inputs[::-1]})
    manifest = bundle.manifest.model_copy(update={"graphs": {SIZE: other}})
    with pytest.raises(IntegrityError, match="not the ones in the manifest"):
        open_engine("onnxruntime", Bundle(bundle.folder, manifest), SIZE)
