"""Execution providers: the right one, with the right options, or an error before any work."""

import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines import PROVIDERS, open_engine, ort, ort_providers, require_backend
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.manifest import EngineRecord, PlanRecord
from lcexport.engines.ort_providers import (
    CPU,
    CUDA,
    TENSORRT,
    TENSORRT_RTX,
    configure,
    missing_libraries,
    options_of,
    provider_of,
    slot_from,
)

SIZE = "64x96x9"
GPU = torch.device("cuda", 1)
OVER_PLANS = [f"onnxruntime-{compiled}" for compiled in PROVIDERS]


@pytest.fixture
def gpu(monkeypatch):
    """torch and ONNX Runtime say that there are two GPUs and every provider."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(ort_providers, "missing_libraries", lambda path: [])


@pytest.fixture
def bundle(demo_bundle) -> Bundle:
    return open_bundle(demo_bundle)


def with_plans(bundle: Bundle, ep_context: str | None, plan: str = "dit.safetensors") -> Bundle:
    """A bundle that says its weights file is a plan, for what does not read plans."""
    record = bundle.graph(SIZE)
    plans = (
        PlanRecord(
            file=plan,
            first_block=0,
            last_block=3,
            inputs=record.inputs,
            outputs=record.outputs,
            attentions=8,
        ),
    )
    engine = EngineRecord(
        plans=plans,
        product="tensorrt",
        version="10.16.1.11",
        platform="linux-x86_64",
        compute_capabilities=("sm90",),
        gpu="NVIDIA H100",
        driver="13.0",
        options={},
        verified=False,
        ep_context=ep_context,
    )
    update = {"engines": {"tensorrt": {SIZE: engine}}}
    return Bundle(bundle.folder, bundle.manifest.model_copy(update=update))


def test_each_backend_has_its_provider():
    assert provider_of("onnxruntime", torch.device("cpu")) == CPU
    assert provider_of("onnxruntime", GPU) == CUDA
    assert [provider_of(backend, GPU) for backend in OVER_PLANS] == [TENSORRT, TENSORRT_RTX]


def test_cuda_keeps_float32_and_takes_no_more_memory_than_it_is_asked_for():
    options = options_of(CUDA, GPU, 4660)
    assert options["use_tf32"] == "0"
    assert options["arena_extend_strategy"] == "kSameAsRequested"


def test_a_recorded_run_is_asked_for_where_it_is_wanted():
    for more in ({}, {"enable_cuda_graph": "1"}):
        found = configure(onnxruntime.SessionOptions(), CUDA, GPU, 4660, cuda_graph=bool(more))
        assert found == [(CUDA, options_of(CUDA, GPU, 4660) | more)]


def test_a_processor_gets_as_many_threads_as_torch_has(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    session = onnxruntime.SessionOptions()
    configure(session, CPU, torch.device("cpu"), 0)
    assert session.intra_op_num_threads == 5


@pytest.mark.parametrize("provider", [CUDA, TENSORRT, TENSORRT_RTX])
def test_every_gpu_provider_works_on_the_engines_stream(provider):
    assert options_of(provider, GPU, 4660)["user_compute_stream"] == "4660"


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_the_device_is_the_one_asked_for(provider):
    assert options_of(provider, GPU, 4660)["device_id"] == "1"


def test_tensorrt_is_not_given_what_it_refuses_and_no_leave_to_change_types():
    options = options_of(TENSORRT, GPU, 4660)
    assert set(options) == {"device_id", "user_compute_stream"}


def test_plain_cuda_is_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert ort.placed("cuda") == torch.device("cuda", 3)
    assert ort.placed("cuda:1") == GPU
    assert ort.placed("cpu") == torch.device("cpu")


@pytest.mark.parametrize("backend", OVER_PLANS)
def test_plans_do_not_run_on_a_processor(backend):
    with pytest.raises(IncompatibleError, match=r"NVIDIA GPUs; got device cpu\. Use --device cuda"):
        require_backend(backend, "bf16", "cpu")


@pytest.mark.parametrize(
    ("backend", "name"), [("onnxruntime", "CUDA"), ("onnxruntime-tensorrt", "Tensorrt")]
)
def test_a_wheel_without_the_provider_says_what_to_install(backend, name, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    match = rf"has no {name} provider; got CPUEx.*pip install onnxruntime-gpu"
    with pytest.raises(IncompatibleError, match=match):
        require_backend(backend, "bf16", "cuda")


def test_a_missing_plug_in_says_what_to_install():
    if ort_providers.importlib.util.find_spec(ort_providers.PLUGIN):
        pytest.skip("the plug-in is installed")
    with pytest.raises(IncompatibleError, match=r"pip install onnxruntime-ep-nv-tensorrt-rtx$"):
        require_backend("onnxruntime-tensorrt-rtx", "bf16", "cuda")


def test_a_plug_in_that_does_not_load_is_one_error(monkeypatch, tmp_path):
    library = tmp_path / "plugin.so"
    library.write_bytes(b"no library")
    plugin = types.ModuleType(ort_providers.PLUGIN)
    plugin.get_library_path = lambda: str(library)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, ort_providers.PLUGIN, plugin)
    monkeypatch.setattr(ort_providers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(IncompatibleError, match=r"does not load; got .*plugin\.so") as caught:
        require_backend("onnxruntime-tensorrt-rtx", "bf16", "cuda")
    assert "\n" not in str(caught.value)


def test_a_provider_of_missing_libraries_names_them(gpu, monkeypatch):
    lacks = ["libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10"]
    monkeypatch.setattr(ort_providers, "missing_libraries", lambda path: lacks)
    match = r"got no libcublas\.so\.13, libnvinfer.*pip install 'tensorrt-cu13>=10\.14,<11'"
    with pytest.raises(IncompatibleError, match=match):
        require_backend("onnxruntime-tensorrt", "bf16", "cuda")
    monkeypatch.setattr(ort_providers, "missing_libraries", lambda path: ["libnvinfer.so.11"])
    with pytest.raises(IncompatibleError, match=r"'tensorrt-cu13>=11,<12'"):
        require_backend("onnxruntime-tensorrt", "bf16", "cuda")
    other = ["libnvrtc.so.13", "libnvJitLink.so.12"]
    monkeypatch.setattr(ort_providers, "missing_libraries", lambda path: other)
    with pytest.raises(IncompatibleError, match=r"no libnvrtc.*Install NVIDIA's driver"):
        require_backend("onnxruntime-tensorrt", "bf16", "cuda")
    monkeypatch.setattr(ort_providers, "missing_libraries", lambda path: lacks[:1])
    with pytest.raises(IncompatibleError, match=r"no libcublas\.so\.13; torch is built for CUDA"):
        require_backend("onnxruntime", "bf16", "cuda")


def test_missing_libraries_are_read_from_the_providers_own_linkage(tmp_path, monkeypatch):
    provider = tmp_path / "provider.so"
    names = [b"libc.so.6", b"libnvthere.so.1", b"libnvmissing.so.10", b"libcumissing.so.13"]
    provider.write_bytes(b"\x7fELF\0" + b"\0".join(names) + bytes(70_000) + b"\0libnvlate.so.1\0")
    monkeypatch.setattr(ort_providers, "loads", lambda name: name == "libnvthere.so.1")
    assert missing_libraries(provider) == ["libcumissing.so.13", "libnvmissing.so.10"]
    assert missing_libraries(tmp_path / "absent.so") == ["absent.so"]


def test_the_loader_is_asked():
    assert ort_providers.loads("libc.so.6")
    assert not ort_providers.loads("libnosuchlibrary.so.99")


def test_a_device_that_is_not_there(gpu):
    require_backend("onnxruntime", "bf16", "cuda:1")
    with pytest.raises(UsageError, match="got cuda:2; wanted cuda:0 to cuda:1"):
        require_backend("onnxruntime", "bf16", "cuda:2")


def test_the_plug_ins_device_is_the_one_in_the_same_slot(monkeypatch):
    def device(slot: str, name: str = TENSORRT_RTX) -> SimpleNamespace:
        return SimpleNamespace(ep_name=name, device=SimpleNamespace(metadata={"pci_bus_id": slot}))

    here = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    found = [device("0000:c1:00.0", CUDA), device("0000:41:00.0"), device("00000000:C1:00.0")]
    monkeypatch.setattr(ort_providers, "require_plugin", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    monkeypatch.setattr("onnxruntime.get_ep_devices", lambda: found)
    assert ort_providers.plugin_device(GPU) is found[2]
    found.pop()
    with pytest.raises(IncompatibleError, match="offers no cuda:1; got 1 other devices"):
        ort_providers.plugin_device(GPU)


@pytest.mark.parametrize("text", ["", "c1:00.0", "0000:c1:00.0 ", "0000:zz:00.0"])
def test_what_is_no_slot(text):
    assert slot_from(text) == ()


def test_without_plans_there_is_nothing_to_run(bundle, gpu):
    with pytest.raises(UsageError, match="holds no tensorrt engine for 64x96x9; got none"):
        open_engine("onnxruntime-tensorrt", bundle, SIZE, "cuda:0")


def test_plans_without_their_model_say_how_to_make_it(bundle, gpu):
    match = (
        r"no EPContext model\. Build it: .*tensorrt,onnxruntime-tensorrt .*--segments 1 --ep-con"
    )
    with pytest.raises(UsageError, match=match):
        open_engine("onnxruntime-tensorrt", with_plans(bundle, None), SIZE, "cuda:0")


def test_a_plan_is_hashed_before_onnx_runtime_sees_it(bundle, gpu, tmp_path, monkeypatch):
    copied = Path(tmp_path / "copy")
    copied.mkdir()
    for name in (f"dit.{SIZE}.onnx", "dit.safetensors"):
        (copied / name).write_bytes((bundle.folder / name).read_bytes())
    weights = copied / "dit.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = with_plans(Bundle(copied, bundle.manifest), f"dit.{SIZE}.onnx")
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *given, **named: pytest.fail("read"))
    with pytest.raises(IntegrityError, match=r"dit\.safetensors is damaged"):
        open_engine("onnxruntime-tensorrt", changed, SIZE, "cuda:0")


def test_a_provider_that_is_left_out_is_an_error(make_graph, monkeypatch):
    """As when a library of the provider's is missing: ONNX Runtime goes on with the processor."""
    monkeypatch.setattr(ort, "configure", lambda *given, **more: [(CPU, {})])
    monkeypatch.setattr(ort, "provider_of", lambda *given: CUDA)
    with pytest.raises(IncompatibleError, match=f"left out .*got {CPU}; wanted {CUDA}"):
        ort.OrtEngine(make_graph())


def test_nothing_is_printed_where_a_provider_is_refused(make_graph, monkeypatch, capfd):
    monkeypatch.setattr(ort, "configure", lambda *given, **more: [("NoSuchProvider", {})])
    with (
        pytest.warns(UserWarning, match="NoSuchProvider"),
        pytest.raises(IncompatibleError, match=r"cannot open .*NoSuchProvider"),
    ):
        ort.OrtEngine(make_graph())
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OVER_PLANS)
def test_a_bundles_plans_repeat_its_golden_outputs(backend):
    from lcexport.compare import STEP_TOLERANCE, difference
    from lcexport.golden import BRANCHES, read_golden, run_branch

    folder = os.environ.get("LCEXPORT_TEST_BUNDLE")
    if folder is None:
        pytest.skip("$LCEXPORT_TEST_BUNDLE names no bundle built with --ep-context on this GPU")
    bundle = open_bundle(folder)
    if backend.removeprefix("onnxruntime-") not in bundle.manifest.engines:
        pytest.skip(f"the bundle has no plans for {backend}")
    resolution = next(iter(bundle.manifest.graphs))
    golden = read_golden(bundle, resolution)
    with open_engine(backend, bundle, resolution, "cuda") as engine:
        for branch in BRANCHES:
            found = difference(run_branch(engine, golden, branch), golden[f"velocity_{branch}"])
            assert STEP_TOLERANCE["bf16"].holds(found)
